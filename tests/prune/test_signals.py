"""Do SIGINT, SIGTERM and SIGHUP end a run with one line, its exit code, nothing half-written and no process left?"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.prune.__main__ import main as prune

MANY = ",".join(f"{number / 8000:.6f}" for number in range(1, 1500))
START_S, STOP_S = 120, 30


def begin(folder: Path, output: Path, **changes: str) -> "subprocess.Popen[str]":
    """Start a run that takes minutes, and return once its first candidate is on disk."""
    (folder / "home").mkdir(exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "neuronal_ray.prune", *prune_arguments(folder, output, block_lambdas=MANY, **changes)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment | {"HOME": str(folder / "home")},
    )
    give_up = time.monotonic() + START_S
    while not list(output.parent.glob(f".{output.name}.journal/*/*.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up, "no candidate is finished"
        time.sleep(0.05)
    return process


def assert_stopped(process: "subprocess.Popen[str]", output: Path, number: signal.Signals, *, times: int = 1) -> None:
    """The run ends as the first line of this file says."""
    children = psutil.Process(process.pid).children(recursive=True)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.2)
    printed, said = process.communicate(timeout=STOP_S)
    assert process.returncode == 128 + number, (process.returncode, said)
    lines = [line for line in said.splitlines() if not line.startswith("[")]
    what = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    kept = "what is finished was kept: the same command with --resume goes on from there"
    assert lines == [f"neuronal-ray prune: {what}; {kept}"], said
    assert printed == ""
    _, alive = psutil.wait_procs(children, timeout=STOP_S)
    assert not alive, alive
    assert [path.name for path in output.parent.iterdir() if "out" in path.name] == [".out.journal"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("times", [1, 3])
def test_a_run_in_this_process(folder: Path, number: signal.Signals, times: int) -> None:
    assert_stopped(begin(folder, folder / "out"), folder / "out", number, times=times)


def test_nohup_keeps_a_run_alive_on_hangup(folder: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = begin(folder, folder / "out")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    assert_stopped(process, folder / "out", signal.SIGTERM)


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_on_a_local_ray(folder: Path, number: signal.Signals) -> None:
    process = begin(folder, folder / "out", address="local", replicas="2")
    assert_stopped(process, folder / "out", number)
    assert not list((folder / "home").rglob("auth_token")), "Ray's token goes with the run"


def test_handlers_are_restored(folder: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert prune(["--model", " "]) == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
