"""Inference speed with 60, 70 and 80 % zeros on the shapes of a real model: runs `benchmark inference` for each.

    python jobs/inference.py --output runs/inference --models runs/models --deepsparse-python PATH

The models have the shapes of TinyLlama-1.1B and random weights in bfloat16; in every row of every linear the smallest
weights are removed. (The time of a product does not depend on the values.) The torch runtimes run all 22 blocks; the
others, whose graphs are float32, run four. A step whose JSON file exists is not measured again. OUTPUT/tables.md has
all results.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from statistics import median

from neuronal_ray.benchmark import inference as benchmark_inference
from neuronal_ray.benchmark.runtimes.measured import GIB, gain
from neuronal_ray.cli.exit_codes import Unfinished, exit_code

SPARSITIES = (60, 70, 80)
SHAPES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}
STEPS = {  # name: blocks, runtimes
    "packed": (22, "packed"),
    "eager": (22, "eager"),
    "graph": (4, "onnxruntime,openvino,openvino-8bit"),
    "deepsparse": (4, "deepsparse"),
    "others": (4, "compiled,packed,csr"),
}


def main() -> int:
    """Return exit code 0 when all steps are done, 1 when one failed."""
    return exit_code("jobs/inference.py", _main)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, required=True, metavar="DIR", help="directory for the models (9 GB)")
    parser.add_argument("--steps", default=",".join(STEPS), metavar="NAMES", help=f"some of: {', '.join(STEPS)}")
    parser.add_argument("--only", type=int, choices=SPARSITIES, help="one sparsity")
    parser.add_argument("--deepsparse-python", metavar="PATH", help="if absent, the deepsparse step is left out")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in arguments.steps.split(","):
        blocks, runtimes = STEPS[name]
        options = ["--runtimes", runtimes]
        if name == "deepsparse":
            if arguments.deepsparse_python is None:
                continue
            options += ["--deepsparse-python", arguments.deepsparse_python]
        dense = arguments.models / f"{blocks}-blocks" / "dense"
        for percent in SPARSITIES if arguments.only is None else (arguments.only,):
            result = arguments.output / f"{name}-{percent}.json"
            if result.is_file():
                continue
            sparse = dense.with_name(str(percent))
            _write_models(dense, sparse, blocks=blocks, rate=percent / 100)
            command = ["--model", str(sparse), "--against", str(dense), "--output", str(result)]
            try:
                benchmark_inference.main([*command, *options])
            except ValueError as error:  # the other steps go on
                print(f"{result.stem}: {error}", file=sys.stderr)
            failed += [] if result.is_file() and json.loads(result.read_text())["pairs"] else [result.stem]
    (arguments.output / "tables.md").write_text(render(arguments.output))
    if failed:
        raise Unfinished(f"not measured: {', '.join(failed)}")


def render(folder: Path) -> str:
    """Return a Markdown table of every measured step in `folder`."""
    columns = ["blocks", "runtime", "zeros", "model", "disk", "load", "peak", "held"]
    phases = [(phase, batch) for batch in ("1", "8") for phase in ("prefill", "decode")]
    rows = [columns + [f"{phase} {batch}" for phase, batch in phases] + ["repeatable"], ["---"] * 13]
    for name, (blocks, _) in STEPS.items():
        for percent in SPARSITIES:
            file = folder / f"{name}-{percent}.json"
            for pair in json.loads(file.read_text())["pairs"] if file.is_file() else ():
                for which in ("dense", "sparse"):
                    side = pair[which]
                    cells = [f"{side['disk_bytes'] / GIB:.2f}", f"{side['load_s']:.1f} s"]
                    cells += [f"{side[key] / GIB:.2f}" for key in ("peak_bytes", "held_bytes")]
                    cells += [f"{median(side[phase][batch]):.1f}" for phase, batch in phases]
                    within = f"{pair['repeatability']:.1%}"
                    rows.append([str(blocks), pair["runtime"], f"{percent} %", which, *cells, within])
                gains = [gain(pair["sparse"][phase][batch], pair["dense"][phase][batch]) for phase, batch in phases]
                words = [
                    f"**{one.ratio:.2f}**" if one.real else f"no gain ({one.ratio:.2f} <= {one.threshold:.2f})"
                    for one in gains
                ]
                rows.append(["", "", "", "sparse / dense", "", "", "", "", *words, ""])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _write_models(dense: Path, sparse: Path, *, blocks: int, rate: float) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from neuronal_ray.cli.atomic import staged
    from neuronal_ray.models.synthetic import write_random_llama

    if not dense.is_dir():
        write_random_llama(dense, SHAPES | {"num_hidden_layers": blocks}, dtype=torch.bfloat16)
    if sparse.is_dir():
        return
    tensors = load_file(dense / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            smallest = weight.float().abs().argsort(dim=1)[:, : round(rate * weight.shape[1])]
            weight.scatter_(1, smallest, 0)
    with staged(sparse) as staging:
        for file in dense.glob("*.json"):
            shutil.copyfile(file, staging / file.name)
        save_file(tensors, staging / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    sys.exit(main())
