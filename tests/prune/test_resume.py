"""Does a run that was stopped go on where it was, ask nothing twice, and end with the bits of one that was not?"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path

import pytest
import torch
from tiny import prune_arguments, write_model, write_texts

import neuronal_ray.prune.__main__
from neuronal_ray.cli.versions import code_version
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group
from neuronal_ray.prune.journal import Journal, Number
from neuronal_ray.workers.shard import ChainTask
from neuronal_ray.workers.tasks import candidates, probes
from neuronal_ray.workers.worker import Worker

BYTE_EQUAL = ("model.safetensors", "allocation.parquet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "model")
    write_texts(folder)
    return folder


MODES = {
    "paper": {"mode": "paper", "block_lambdas": "0.05,0.1,0.2", "row_lambdas": "0,0.1"},
    "best": {"mode": "best", "search_budget": "40"},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_asks_nothing_twice(
    mode: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"allocation": "", **MODES[mode]} if mode == "best" else MODES[mode]
    options = {name: value for name, value in options.items() if value}
    asked: list[str] = []
    stop_after = 10**9

    def counted(task: ChainTask) -> ChainTask:
        @wraps(task.steps)
        def steps(worker: Worker, *args: object, **kwargs: object) -> object:
            if len(asked) >= stop_after:
                raise KeyboardInterrupt
            asked.append(task.name)
            return task.steps(worker, *args, **kwargs)

        return ChainTask(steps)

    for module, name in ((candidates, "trials"), (candidates, "divergences"), (probes, "changed")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, tmp_path / "whole", **options)) == 0
    total = len(asked)
    assert total > 3
    arguments = prune_arguments(folder, tmp_path / "out", **options)
    done = 0
    for at in (1, total // 2, total - 1):
        asked.clear()
        stop_after = at - done
        assert neuronal_ray.prune.__main__.main([*arguments, "--resume"]) == 130
        done = at
        assert {path.name for path in tmp_path.iterdir()} == {"whole", ".out.journal"}
    asked.clear()
    stop_after = 10**9
    assert neuronal_ray.prune.__main__.main([*arguments, "--resume"]) == 0
    assert len(asked) == total - done, "a finished candidate was asked for again"
    assert "finished candidates are taken from" in capsys.readouterr().err
    for name in BYTE_EQUAL:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    searches = [json.loads((tmp_path / name / "pruning.json").read_text())["search"] for name in ("whole", "out")]
    scores = [[step["candidates"] for step in found.values()] for found in searches]
    assert scores[0] == scores[1]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_driver_killed_outright_is_resumed(folder: Path, tmp_path: Path) -> None:
    options = MODES["paper"]
    whole = prune_arguments(folder, tmp_path / "whole", **options)
    assert neuronal_ray.prune.__main__.main(whole) == 0
    arguments = prune_arguments(folder, tmp_path / "out", **options)
    command = [sys.executable, "-m", "neuronal_ray.prune", *arguments]
    driver = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while not list(tmp_path.glob(".out.journal/*/*.safetensors")) and time.monotonic() < give_up:
        assert driver.poll() is None, "the run was over before it could be killed"
        time.sleep(0.005)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "out").exists()
    kept = len(list(tmp_path.glob(".out.journal/*/*.safetensors")))
    resumed = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert resumed.returncode == 0, resumed.stderr
    assert f"{kept} finished candidates are taken from" in resumed.stderr
    for name in BYTE_EQUAL:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def test_a_full_disk_is_one_line_and_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the write fails in the middle in the same way."""
    options = MODES["paper"]
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, tmp_path / "whole", **options)) == 0
    arguments = prune_arguments(folder, tmp_path / "out", **options)
    command = [sys.executable, "-m", "neuronal_ray.prune", *arguments]
    size = (folder / "model" / "model.safetensors").stat().st_size
    limit = (size // 2, size // 2)
    full = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    assert full.returncode == 1, full.stderr
    assert "Traceback" not in full.stderr
    assert "written, worker 1: model.safetensors: [Errno 27]" in full.stderr
    assert "--resume goes on" in full.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"whole", ".out.journal"}
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    for name in BYTE_EQUAL:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_without_resume_an_earlier_journal_is_dropped_aloud(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".out.journal" / "old").mkdir(parents=True)
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, tmp_path / "out")) == 0
    assert "--resume would keep them" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_journal_gives_back_what_it_was_given_and_nothing_cut_short(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"search": "one"})
    trial = Trial(
        misalignment=float("inf"),
        signals={Group(2, 0): torch.randn(5), Group(0, 1): torch.randn(3)},
        divergences=(0.1,),
    )
    journal.keep(b"\x01\x02", trial)
    journal.note(Number("loss", b"\x03", (1 / 3,)))
    journal.note(Number("kl", b"\x04", (0.1, float("inf"))))
    (whole,) = tmp_path.rglob("*.safetensors")
    (whole.parent / "ff.safetensors").write_bytes(whole.read_bytes()[:-4])
    (lines,) = tmp_path.rglob("*.jsonl")
    lines.write_text(lines.read_text() + '\n{"kind": "loss", "key": "05", "val')
    again = Journal(tmp_path, {"search": "one"})
    assert list(again.numbers()) == [Number("loss", b"\x03", (1 / 3,)), Number("kl", b"\x04", (0.1, float("inf")))]
    ((digest, found),) = again.trials()
    assert (digest, found.misalignment, found.divergences) == (b"\x01\x02", trial.misalignment, trial.divergences)
    assert found.signals.keys() == trial.signals.keys()
    assert all(torch.equal(found.signals[group], trial.signals[group]) for group in trial.signals)
    again.note(Number("loss", b"\x06", (2.0,)))
    assert Number("loss", b"\x06", (2.0,)) in set(Journal(tmp_path, {"search": "one"}).numbers())
    assert list(Journal(tmp_path, {"search": "other"}).numbers()) == []


def test_a_trial_that_does_not_fit_on_the_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    journal, signals = Journal(tmp_path, {"search": "one"}), {Group(0, 0): torch.ones(1000)}
    journal.note(Number("loss", b"\x06", (2.0,)))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, usual[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            journal.keep(b"\x01", Trial(misalignment=1.0, signals=signals, divergences=()))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert {path.name for path in tmp_path.glob("*/*")} == {"question.json", "numbers.jsonl"}


@pytest.mark.parametrize("damage", ["no directory", "question", "line"])
def test_a_journal_that_cannot_be_read_is_left_as_it_was(
    damage: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, staged = tmp_path / ".out.journal", tmp_path / ".out.partial-1"
    staged.mkdir()
    if damage == "no directory":
        place.write_text("a file")
    else:
        (place / "0123").mkdir(parents=True)
        version = {"neuronal_ray": code_version("wanda", "none")}
        (place / "0123" / "question.json").write_text("[]" if damage == "question" else json.dumps(version))
        (place / "0123" / "numbers.jsonl").write_text('{"kind": "loss", "key": "x", "values": [1]}\n{}')
    before = {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}
    assert (
        neuronal_ray.prune.__main__.main([*prune_arguments(folder, tmp_path / "out", method="wanda"), "--resume"]) == 2
    )
    error = capsys.readouterr().err
    assert "--resume: " in error, error
    assert error.count("\n") == 1, error
    assert {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")} == before
