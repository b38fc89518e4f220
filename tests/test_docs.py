"""The example of docs/add-a-method.md does what the page says: it is extracted, put in place and run."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuronal_ray

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"
PLUG_IN = Path(neuronal_ray.__file__).parent / "algorithms" / "methods" / "softwanda.py"
QUICK = ["--calibration-samples", "4", "--search-samples", "2", "--sequence-length", "32", "--evaluate", "none"]
QUICK += ["--block-lambdas", "0.1", "--row-lambdas", "0,0.1", "--address", "none"]


@pytest.fixture
def plug_in() -> Iterator[None]:
    """The page's Python block as the file that the page names."""
    assert not PLUG_IN.exists()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    try:
        PLUG_IN.write_text(code)
        yield
    finally:
        PLUG_IN.unlink()


IN_TURN = """
import json, sys
from neuronal_ray.prune.__main__ import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def run(runs: dict[str, list[str]], folder: Path) -> dict[str, bytes]:
    """The weights that prunes write, by name; in a process of their own, as options are read at import."""
    words = [[*arguments, *QUICK, "--output", str(folder / name)] for name, arguments in runs.items()]
    command = [sys.executable, "-c", IN_TURN, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (folder / name / "model.safetensors").read_bytes() for name in runs}


@pytest.mark.usefixtures("plug_in")
def test_the_page_adds_a_method(tmp_path: Path) -> None:
    (shell,) = re.findall(r"```\n(python -m neuronal_ray\.prune .*?)```", PAGE.read_text(), re.DOTALL)
    arguments = shlex.split(shell.replace("\\\n", " "))[3:]
    where = arguments.index("--output")
    del arguments[where : where + 2]
    base = ["--model", "builtin", "--calibration", "builtin"]
    soft = [*base, "--method", "softwanda", "--set"]
    runs = {
        "page": arguments,
        "power1": [*soft, "method.power=1"],
        "power0": [*soft, "method.power=0"],
        "wanda": [*base, "--method", "wanda"],
        "magnitude": [*base, "--method", "magnitude"],
    }
    written = run(runs, tmp_path)
    assert written["power1"] == written["wanda"]
    assert written["power0"] == written["magnitude"]
