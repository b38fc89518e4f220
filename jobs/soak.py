"""Soak test: prune and sweep again and again, disturb each run at a random moment, and compare the results.

python jobs/soak.py --rounds 100 --output runs/soak.json

Each round is one command and one kind of fault, at a random moment after the command has begun to work:

    worker      one or two of two workers on a local Ray are killed (SIGKILL)
    hung        a worker on a local Ray is stopped (SIGSTOP) and found by --task-timeout
    node        a node of a Ray cluster of four is removed
    driver      the command is killed (SIGKILL) and repeated with --resume
    terminated  the command gets SIGTERM and is repeated with --resume
    disk        files may not grow beyond a random size (RLIMIT_FSIZE), then the command is repeated with --resume
    memory      (not by default) the node's memory is used up until Ray's memory monitor ends workers

A round is survived when the command, or its repetition, ends with exit code 0 and the results equal those of an
undisturbed run bit for bit: all weights, or all plans and values of a sweep; and when nothing else is left beside them.
"""

import argparse
import hashlib
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow.parquet as pq
import torch
from disturbed_run import ON_RAY, DisturbedRun
from safetensors.torch import load_file

from neuronal_ray.data.text import evaluation_text

_FAULTS = ("worker", "hung", "node", "driver", "terminated", "disk")
_WEIGHTS = (3, 1, 2, 4, 5, 5)
_RESUMED = ("driver", "terminated", "disk")
_TASK_TIMEOUT = {"prune": ["--task-timeout", "20"], "sweep": ["--option", "task-timeout=20"]}
"""Where a worker hangs. Healthy tasks take seconds, on a busy machine as well."""
_TEXTS = ["--model", "builtin", "--calibration", "builtin", "--sequence-length", "128", "--calibration-samples", "16"]
_LETTERS = 20_000
"""So much of the built-in evaluation text is evaluated."""
_LAMBDAS = ["--block-lambdas", "0.02,0.05,0.08,0.1,0.15,0.2", "--row-lambdas", "0,0.05,0.1,0.15,0.2"]
_SHARDED = ["--shards", "2", "--replicas", "1"]
_PRUNE = {
    "neuronal, wanda": ["--mode", "paper", *_LAMBDAS],
    "adaptive, wanda": ["--mode", "best", "--search-budget", "25"],
    "neuronal, sparsegpt": ["--mode", "paper", "--method", "sparsegpt", "--block-lambdas", "0.05,0.1,0.2"],
    "uniform, dsnot": ["--mode", "paper", "--allocation", "uniform", "--refinement", "dsnot"],
}
_SWEEP = """
title = "soak"
[options]
model = "builtin"
calibration = "builtin"
evaluate = ["evaluation.txt"]
sequence-length = 128
calibration-samples = 16
threads = 1
mode = "paper"
[grid]
sparsity = [0.6, 0.7]
[[variant]]
name = "Uniform"
allocation = "uniform"
[[variant]]
name = "OWL"
allocation = "owl"
[[variant]]
name = "NeuronAL"
allocation = "neuronal"
block-lambdas = [0.05, 0.1, 0.2]
row-lambdas = [0.0, 0.1]
"""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One disturbed run; `faults_s` are seconds, after work began, at which a fault was made."""

    setting: str
    fault: str
    on_ray: bool
    faults_s: tuple[float, ...]
    seconds: float
    codes: tuple[int, ...]
    equal: bool
    left: tuple[str, ...]
    traceback: bool
    replaced: int

    @property
    def survived(self) -> bool:
        """Whether the results are there, whole and equal, and nothing else."""
        return self.equal and not self.left and not self.traceback


def main() -> int:
    """Return exit code 0 when every run survived its round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of faults and of what is disturbed")
    parser.add_argument(
        "--faults", nargs="+", choices=(*_FAULTS, "memory"), help="these only (default: all but memory)"
    )
    parser.add_argument("--output", type=Path, help="JSON file with every round, written again after each")
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory(prefix="nr-soak-") as folder:
        settings = _settings(Path(folder))
        usual = {name: _undisturbed(words, Path(folder) / "usual" / name) for name, words in settings.items()}
        for number in range(arguments.rounds):
            name = list(settings)[number % len(settings)]
            fault = (
                source.choice(arguments.faults) if arguments.faults else source.choices(_FAULTS, weights=_WEIGHTS)[0]
            )
            place = Path(folder) / f"{number}"
            rounds.append(_round(name, settings[name], fault, usual[name], place, source))
            print(_line(rounds), flush=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps([asdict(done) for done in rounds], indent=1) + "\n")
    return 0 if all(done.survived for done in rounds) else 1


@dataclass(frozen=True, kw_only=True)
class _Usual:
    digest: str
    seconds: float
    largest_bytes: int


def _settings(folder: Path) -> dict[str, list[str]]:
    """Return the commands by name, without their output and address."""
    evaluated = str(folder / "evaluation.txt")
    Path(evaluated).write_text(evaluation_text("builtin", flag="--evaluate").text[:_LETTERS])
    (folder / "sweep.toml").write_text(_SWEEP.replace("evaluation.txt", evaluated))
    common = ["prune", *_TEXTS, "--evaluate", evaluated, "--threads", "1"]
    prunes = {name: [*common, *words] for name, words in _PRUNE.items()}
    return prunes | {"sweep": ["sweep", str(folder / "sweep.toml")]}


def _undisturbed(words: Sequence[str], place: Path) -> _Usual:
    place.mkdir(parents=True)
    run = DisturbedRun([*words, "--output", str(place / "out"), "--address", "none"], place, on_ray=False)
    seconds = run.wait_after_start()
    if run.code != 0:
        raise RuntimeError(f"the undisturbed run of {words} ended with {run.code}: {run.text()[-2000:]}")
    largest = max(path.stat().st_size for path in (place / "out").rglob("*") if path.is_file())
    return _Usual(digest=_digest(place / "out"), seconds=seconds, largest_bytes=largest)


def _round(name: str, words: Sequence[str], fault: str, usual: _Usual, place: Path, source: random.Random) -> Round:
    """Run a command, disturb it, and repeat it if the fault ends it."""
    place.mkdir()
    begin = time.monotonic()
    on_ray = fault in ON_RAY or (fault != "disk" and source.random() < 0.2)
    address = ["--address", "local"] if on_ray and fault != "node" else [] if fault == "node" else ["--address", "none"]
    sharded = on_ray and words[0] == "prune" and source.random() < 0.4
    workers = _SHARDED if sharded else ["--replicas", "2"] if on_ray else []
    timeout = _TASK_TIMEOUT[words[0]] if fault == "hung" else []
    command = [*words, "--output", str(place / "out"), *workers, *address, *timeout]
    moments = sorted(
        source.uniform(0, usual.seconds) for _ in range(2 if fault == "worker" and source.random() < 0.5 else 1)
    )
    limit = int(math.exp(source.uniform(math.log(300), math.log(usual.largest_bytes)))) if fault == "disk" else None
    run = DisturbedRun(
        command,
        place,
        on_ray=on_ray,
        limit=limit,
        node_s=moments[0] if fault == "node" else None,
        memory=fault == "memory",
    )
    faults_s = run.disturb(fault, moments, on_ray=on_ray, source=source)
    codes, texts = [run.code], [run.text()]
    done = words[0] == "prune" and (place / "out").exists()  # the signal came after the last rename
    if fault in _RESUMED and run.code != 0 and not done:
        again = DisturbedRun([*command, "--resume"], place, on_ray=on_ray)
        again.disturb("none", [], on_ray=on_ray, source=source)
        codes.append(again.code)
        texts.append(again.text())
    traceback = any("Traceback (most recent call last)" in text for text in texts)
    if traceback or (codes[-1] != 0 and not done):
        print("\n".join(texts)[-4000:], file=sys.stderr)
    return Round(
        setting=name + (", 2 shards" if sharded else ""),
        fault=fault,
        on_ray=on_ray,
        faults_s=tuple(faults_s),
        seconds=time.monotonic() - begin,
        codes=tuple(codes),
        equal=(codes[-1] == 0 or done) and _digest(place / "out") == usual.digest,
        left=tuple(sorted({path.name for path in place.iterdir()} - {"out", "printed", "begun"})),
        traceback=traceback,
        replaced=sum(text.count("a new worker takes its place") for text in texts),
    )


def _line(rounds: list[Round]) -> str:
    last = rounds[-1]
    return (
        f"{len(rounds)} rounds, {sum(done.survived for done in rounds)} survived, "
        f"{sum(bool(done.faults_s) for done in rounds)} disturbed; last: {last.setting}, {last.fault}"
        f"{' on Ray' if last.on_ray else ''} at {', '.join(f'{s:.1f}' for s in last.faults_s) or '-'} s, "
        f"exit codes {last.codes}, {last.seconds:.0f} s{'' if last.survived else ', NOT SURVIVED'}"
    )


def _digest(output: Path) -> str:
    """Return a digest of a model's weights by name, or of a sweep's plans and values, whichever files they are in."""
    sha = hashlib.sha256()
    tensors = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    plans = [json.dumps(pq.read_table(file).to_pylist()) for file in output.glob("plans/*.parquet")]
    rows = [row for file in output.glob("results/*.parquet") for row in pq.read_table(file).to_pylist()]
    # Not by the cells' ids, which --task-timeout is part of.
    values = [repr([row[key] for key in ("variant", "sparsity", "achieved", "evaluation", "value")]) for row in rows]
    for text in (*sorted(plans), *sorted(values)):
        sha.update(text.encode())
    return sha.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
