"""What is good before it is damaged: a model, texts, results of all commands, and the command lines that read them.

A case gets a folder of its own with what its command needs: `model`, texts, `run` (a result of prune), `study` (one of
sweep), `masks.safetensors`, `search.json`, `sweep.toml`, and `here`, the working directory. Nothing is at `out`.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import LENGTH, write_model, write_texts

from neuronal_ray.__main__ import main as _script

_QUICK = ["--method", "wanda", "--allocation", "uniform", "--mode", "paper", "--search-samples", "2"]
_READ = ["--sequence-length", str(LENGTH), "--threads", "1", "--address", "none"]
_TRIES = 5
_SEARCHED = ["--mode", "paper", "--search-samples", "2", "--row-lambdas", "0,0.1"]
SWEEP = """# run it in `here`
title = "A study"
output = "../study"
[options]
model = "../model"
calibration = "../calibration.txt"
evaluate = ["../evaluation.txt"]
calibration-samples = 4
search-samples = 2
sequence-length = 32
threads = 1
mode = "paper"
address = "none"
[grid]
sparsity = [0.5, 0.6]
[[variant]]
name = "Uniform"
allocation = "uniform"
"""


def _prune(folder: Path) -> list[str]:
    words = ["--model", f"{folder}/model", "--sparsity", "0.6", "--calibration", f"{folder}/calibration.txt"]
    words += ["--evaluate", f"{folder}/evaluation.txt", "--calibration-samples", "4", "--output", f"{folder}/out"]
    return ["prune", *words, *_READ]


def _evaluate(folder: Path) -> list[str]:
    words = ["--model", f"{folder}/model", "--evaluate", f"{folder}/evaluation.txt", "--output", f"{folder}/out.json"]
    return ["evaluate", *words, *_READ]


def _export(*words: str) -> Callable[[Path], list[str]]:
    def arguments(folder: Path) -> list[str]:
        return ["export", "--model", f"{folder}/model", *(word.replace("FOLDER", str(folder)) for word in words)]

    return arguments


def _sweep(*words: str) -> Callable[[Path], list[str]]:
    return lambda folder: ["sweep", f"{folder}/sweep.toml", *words]


COMMANDS: dict[str, tuple[Callable[[Path], list[str]], tuple[str, ...]]] = {
    "prune": (lambda folder: [*_prune(folder), *_QUICK], ("model", "texts")),
    "prune --dry-run": (lambda folder: [*_prune(folder), *_QUICK, "--dry-run"], ("model", "texts")),
    "prune --resume": (lambda folder: [*_prune(folder), *_SEARCHED, "--resume"], ("model", "texts", ".out.journal")),
    "evaluate": (_evaluate, ("model", "texts")),
    "export": (_export(), ("run as model",)),
    "export --format dense": (_export("--format", "dense", "--output", "FOLDER/out"), ("run as model",)),
    "export --format packed": (_export("--format", "packed", "--output", "FOLDER/out"), ("run as model",)),
    "export --format masks": (_export("--format", "masks", "--output", "FOLDER/out.safetensors"), ("run as model",)),
    "export --masks": (
        _export("--masks", "FOLDER/masks.safetensors", "--output", "FOLDER/out"),
        ("model", "masks.safetensors"),
    ),
    "sweep": (_sweep(), ("model", "texts")),
    "sweep --dry-run": (_sweep("--dry-run"), ("model", "texts")),
    "sweep --resume": (_sweep("--resume"), ("model", "texts", "study")),
    "report RUN": (lambda folder: ["report", f"{folder}/run"], ("run",)),
    "report STUDY": (lambda folder: ["report", f"{folder}/study", "--output", f"{folder}/out.html"], ("study",)),
    "benchmark table": (lambda folder: ["benchmark", "table", f"{folder}/search.json"], ("search.json",)),
    "": (lambda _: [], ()),
}
"""The command line that succeeds in a good folder, and what it needs there."""

PRUNES = ("prune", "prune --dry-run")
LOADS = ("prune", "prune --dry-run", "evaluate", "sweep", "sweep --dry-run")
EXPORTS = ("export", "export --format dense", "export --format packed", "export --format masks")

_MEASURED = {
    "machine": {
        "date": "2026-11-28", "processor": "x", "cores": 2, "threads": 2, "host_bytes": 2**34, "devices": [],
        "versions": {"python": "3.11", "torch": "2.13.0"},
    },
    "measured": [
        {
            "kind": "SearchMeasured", "name": "tiny", "blocks": 3, "dtype": "float32", "offload": False, "samples": 2,
            "length": 32, "search_s": 1.0, "forwards_alone_s": 0.5, "floor_s": 0.4, "staged_s": 1.1,
            "token_forwards": 1000, "device_bytes": None, "formula_bytes": None, "host_bytes": 2**30, "literal": None,
            "stages": [{"name": "ranking", "seconds": 0.1}, {"name": "masks", "seconds": 0.1}],
        },
    ],
}  # fmt: skip


def command_line(*arguments: str) -> int:
    """Do what the installed script does with these arguments, in this process; return its exit code."""
    before = sys.argv
    sys.argv = ["neuronal-ray", *arguments]
    try:
        return _script()
    finally:
        sys.argv = before


def write_good(folder: Path) -> None:
    """Write everything that cases begin with."""
    folder.mkdir(parents=True, exist_ok=True)
    write_model(folder / "model")
    write_texts(folder)
    rows = torch.randint(3, 90, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows}, folder / "tokens.safetensors")
    (folder / "search.json").write_text(json.dumps(_MEASURED))
    (folder / "sweep.toml").write_text(SWEEP)
    run = [*_prune(folder), *_SEARCHED, "--block-lambdas", "0.05,0.1", "--output", str(folder / "run")]
    masks = ["export", "--model", f"{folder}/run", "--format", "masks", "--output", f"{folder}/masks.safetensors"]
    (folder / "here").mkdir()
    for arguments in (run, masks, ["sweep", str(folder / "sweep.toml")]):
        with chdir(folder / "here"):
            code = command_line(*arguments)
        if code != 0:
            raise RuntimeError(f"{arguments} ended with {code}")
    _stop_in_search(folder)


def _stop_in_search(folder: Path) -> None:
    """Leave `.out.journal`, as a run does that is interrupted by Ctrl-C."""
    journal = folder / ".out.journal"

    def interrupt() -> None:
        while not (folder / "out").exists():
            if len(list(journal.glob("*/*.safetensors"))) >= 3:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.001)

    lambdas = ",".join(f"{number / 1000}" for number in range(1000))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    for _ in range(_TRIES):  # on a busy machine the search may be done before the thread looks
        threading.Thread(target=interrupt, daemon=True).start()
        code = command_line(*_prune(folder), *_SEARCHED, "--block-lambdas", lambdas)
        if code == 130 and journal.is_dir():
            signal.signal(signal.SIGINT, usual)
            return
        shutil.rmtree(folder / "out", ignore_errors=True)
    raise RuntimeError(f"the interrupted run ended with {code}")


def prepare(command: str, good: Path, folder: Path) -> list[str]:
    """Copy what the command needs from the good folder into `folder`; return the arguments."""
    arguments, needed = COMMANDS[command]
    (folder / "here").mkdir(parents=True)
    for name in needed:
        if name == "texts":
            for text in ("calibration.txt", "evaluation.txt", "tokens.safetensors"):
                shutil.copyfile(good / text, folder / text)
        else:
            source, _, target = name.partition(" as ")
            _copy(good / source, folder / (target or source))
    if command.startswith("sweep"):
        (folder / "sweep.toml").write_text(SWEEP)
    return arguments(folder)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the folder's model."""
    return load_file(folder / "model" / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the weights of the folder's model."""
    save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})


def warm_up(good: Path) -> None:
    """Import what the first case would pay for."""
    command_line(*_evaluate(good), "--evaluate", "nope")
    command_line(*_prune(good), "--address", "127.0.0.1:1")
