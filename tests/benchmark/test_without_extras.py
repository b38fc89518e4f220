"""Does everything but distribution, hub data and benchmarks run where ray, datasets and lm-eval are not installed?"""

import json
import subprocess
import sys
from pathlib import Path

from tiny import prune_arguments, write_model, write_texts

BARE = '''
import sys

class Without:
    """A finder that does not find some packages."""

    names = {"ray", "datasets", "lm_eval", "lm-eval", "triton", "beartype"}

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in self.names else self.finder.find_spec(name, path, target)

    def find_distributions(self, context):
        find = getattr(self.finder, "find_distributions", None)
        return [] if find is None or context.name in self.names else find(context)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import importlib.util
assert all(importlib.util.find_spec(name) is None for name in ("ray", "datasets", "lm_eval"))
'''


SHAPE = """
import neuronal_ray.prune.__main__
from neuronal_ray.benchmark.__main__ import main
from neuronal_ray.benchmark.shapes import SHAPES, Shape
config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES["tiny"] = Shape(config=config | {"vocab_size": 128}, length=32)
"""


def test_a_model_is_pruned_reported_and_measured(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    prune = prune_arguments(tmp_path, tmp_path / "out")
    common = ["--shape", "tiny", "--threads", "1", "--device", "cpu", "--dtype", "bfloat16"]
    common += ["--checkpoints", str(tmp_path / "models")]
    search = ["search", *common, "--samples", "2", "--offload", "--output", str(tmp_path / "search.json")]
    job = ["job", *common, "--calibration-samples", "3", "--search-samples", "2", "--windows", "2,3,1"]
    job += ["--output", str(tmp_path / "job.json")]
    code = "assert main(['cluster']) == 2\n"
    code += f"sys.exit(neuronal_ray.prune.__main__.main({prune!r}) or main({search!r}) or main({job!r}))"
    done = subprocess.run([sys.executable, "-c", BARE + SHAPE + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "whole job" in done.stdout
    assert "error: cluster: ray is not installed" in done.stderr

    summary = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert "ray" not in summary["versions"]
    assert "torch" in summary["versions"]
    assert (tmp_path / "out" / "report.html").is_file()
    (found,) = json.loads((tmp_path / "search.json").read_text())["measured"]
    assert (found["offload"], found["candidates"], found["literal"]) == (True, 28, None)
    (found,) = json.loads((tmp_path / "job.json").read_text())["measured"]
    texts = {f"text{number}: {model}" for number in (1, 2, 3) for model in ("dense", "pruned")}
    stages = {
        "loading",
        "zeros of the input",
        "statistics",
        "ranking",
        "block search",
        "row search",
        "checkpoint",
    } | texts
    assert stages == set(found["stages"])
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["llama-tiny-2"], "the pruned copy is gone"
