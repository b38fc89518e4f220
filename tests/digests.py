"""Print a digest of everything that a set of small runs computes: proof that a change of structure changes no number.

    python tests/digests.py              # one JSON object: run -> digests of weights, plan, scores, perplexities
    python tests/digests.py --check      # compare with what is recorded for this kind of processor; exit code 1 if not
    python tests/digests.py --record     # record it, after a change that is meant to change numbers

The runs go through the command line, in one process and on one thread. Floating-point sums depend on the processor's
vector units and on the version of torch, so digests are recorded in digests.json by both.
"""

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import torch
from conftest import tiny_model
from safetensors import safe_open
from tiny import prune_arguments, write_model, write_texts, write_tokenizer

from neuronal_ray.__main__ import main as neuronal_ray

RECORD = Path(__file__).with_name("digests.json")

_BEST = {"mode": "best", "search_budget": "40"}

RUNS: dict[str, dict[str, str | None]] = {
    "paper wanda neuronal": {},
    "authors wanda neuronal": {"mode": "authors"},
    "best wanda adaptive": _BEST,
    "best sparsegpt adaptive": _BEST | {"method": "sparsegpt"},
    "best wanda adaptive n:8": _BEST | {"pattern": "n:8"},
    "paper sparsegpt neuronal": {"method": "sparsegpt"},
    "paper alps owl": {"method": "alps", "allocation": "owl", "set": "method.iterations=6"},
    "paper multiflow dlp dsnot": {"method": "multiflow", "allocation": "dlp", "refinement": "dsnot"},
    "paper magnitude alphapruning neuronal rows": {
        "method": "magnitude",
        "allocation": "alphapruning",
        "row_step": "neuronal",
    },
    "paper wanda dsa": {"allocation": "dsa"},
    "paper wanda atp": {"allocation": "atp", "set": "allocation.max_candidates=3"},
    "paper wanda besa": {"allocation": "besa", "set": "allocation.steps=3"},
    "paper wanda uniform 2:4": {"allocation": "uniform", "pattern": "2:4", "sparsity": None},
    "paper wanda owl trim dsnot": {"allocation": "owl", "row_step": "trim", "refinement": "dsnot"},
    "paper wanda pruned stream": {"score_stream": "pruned"},
    "authors sparsegpt owl": {"mode": "authors", "method": "sparsegpt", "allocation": "owl"},
    "authors multiflow uniform dsnot": {
        "mode": "authors",
        "method": "multiflow",
        "allocation": "uniform",
        "refinement": "dsnot",
    },
    "paper wanda neuronal two shards": {"shards": "2"},
    "best sparsegpt adaptive two shards": _BEST | {"method": "sparsegpt", "shards": "2"},
    "best wanda adaptive experts": _BEST | {"model": "experts"},
    "paper sparsegpt neuronal experts": {"method": "sparsegpt", "model": "experts"},
}

_SWEEP = """
title = "digests"

[options]
model = "{folder}/model"
calibration = "{folder}/calibration.txt"
calibration-samples = 6
search-samples = 2
sequence-length = 32
evaluate = ["{folder}/evaluation.txt"]
block-lambdas = [0.05, 0.15]
row-lambdas = [0.0, 0.1]
mode = "paper"
threads = 1
address = "none"

[grid]
method = ["wanda", "magnitude"]
sparsity = [0.5, 0.7]

[[variant]]
name = "Uniform"
allocation = "uniform"

[[variant]]
name = "NeuronAL"
allocation = "neuronal"
"""


def processor() -> str:
    """What a sum's last bits depend on besides its operands."""
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}"


def digest_of(value: object) -> str:
    """Sixteen hexadecimal digits of a JSON value; floats are written to the last bit."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _weights(folder: Path) -> str:
    sha = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def _rows(path: Path, *left_out: str) -> list[dict[str, object]]:
    table = pq.read_table(path)
    return table.drop_columns([name for name in left_out if name in table.column_names]).to_pylist()


def digests_of_run(folder: Path) -> dict[str, str]:
    """Digests of the files that one run wrote."""
    summary = json.loads((folder / "pruning.json").read_text())
    return {
        "weights": _weights(folder),
        "plan": digest_of(_rows(folder / "allocation.parquet")),
        "scores": digest_of(_rows(folder / "search.parquet", "seconds")),
        "perplexities": digest_of(
            {
                name: {key: value for key, value in entry.items() if key != "window_start"}
                for name, entry in summary["evaluation"].items()
            }
        ),
    }


def digests_of_sweep(folder: Path) -> dict[str, str]:
    """Digests of the plans and of the scores that a sweep wrote."""
    rows = [row for path in sorted(folder.glob("results/*.parquet")) for row in _rows(path)]
    kept = ("method", "sparsity", "variant", "evaluation", "metric", "value", "achieved", "block_lambda", "row_lambda")
    found = sorted(json.dumps([row[name] for name in kept]) for row in rows)
    assert found, f"no results in {folder}"
    return {
        "plans": digest_of(sorted(digest_of(_rows(path)) for path in folder.glob("plans/*"))),
        "scores": digest_of(found),
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _command(*arguments: str) -> None:
    before, sys.argv = sys.argv, ["neuronal-ray", *arguments]
    try:
        with _quiet():
            code = neuronal_ray()
    finally:
        sys.argv = before
    assert code == 0, f"exit code {code}: {' '.join(arguments)}"


def compute(folder: Path) -> dict[str, dict[str, str]]:
    """Make every run in `folder`; the digests by the name of the run."""
    torch.set_num_threads(1)
    write_model(folder / "model")
    write_texts(folder)
    tiny_model("mixtral", vocab_size=128, bos_token_id=0).save_pretrained(folder / "experts")
    write_tokenizer(folder / "experts")
    found = {}
    for number, (name, changes) in enumerate(RUNS.items()):
        output = folder / f"run-{number}"
        model = {"model": str(folder / (changes.get("model") or "model"))}
        _command("prune", *prune_arguments(folder, output, **(changes | model)))
        found[name] = digests_of_run(output)
    sweep = folder / "sweep.toml"
    sweep.write_text(_SWEEP.format(folder=folder))
    _command("sweep", str(sweep), "--output", str(folder / "sweep"))
    found["sweep"] = digests_of_sweep(folder / "sweep")
    return found


def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """By processor, then by run."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def main() -> int:
    """Exit code 1 when `--check` finds a difference, or nothing recorded for this processor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--check", action="store_true")
    group.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compute(Path(folder))
    known = recorded()
    if arguments.record:
        RECORD.write_text(json.dumps(known | {processor(): found}, indent=1, sort_keys=True) + "\n")
        return 0
    if arguments.check:
        expected = known.get(processor())
        if expected is None:
            print(f"nothing is recorded for {processor()}; run --record on the commit to compare with")
            return 1
        changed = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
        for name in sorted(changed):
            print(f"{name}: {expected.get(name)} became {found.get(name)}")
        print(f"{len(found) - len(changed)} of {len(found)} runs are equal")
        return 1 if changed else 0
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
