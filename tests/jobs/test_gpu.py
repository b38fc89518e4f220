"""jobs/gpu.sh: its options are ones of the benchmark, it continues after a failure and reports it at the end."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from neuronal_ray.benchmark import job as benchmark_job
from neuronal_ray.benchmark import search as benchmark_search
from neuronal_ray.benchmark import table as benchmark_table
from neuronal_ray.benchmark.__main__ import MEASUREMENTS, main
from neuronal_ray.benchmark.timed import Setting

TESTS = Path(__file__).parents[1]
SCRIPT = TESTS.parent / "jobs" / "gpu.sh"
STUB = """#!/usr/bin/env bash
echo "$@" >> "$CALLS"
[[ $2 != pytest && $3 != job ]]
"""
CARD = {"processor": "a CPU", "cores": 16, "threads": 16, "host_bytes": 2**37, "devices": ["a GPU"]}
MACHINE = CARD | {"date": "2026-01-01", "versions": {"torch": "2"}}
SEARCH = {
    "kind": "SearchMeasured",
    "name": "7b",
    "blocks": 32,
    "dtype": "bfloat16",
    "offload": True,
    "samples": 8,
    "length": 2048,
    "search_s": 30.0,
    "staged_s": 32.0,
    "forwards_alone_s": 20.0,
    "floor_s": 10.0,
    "token_forwards": 3e6,
    "device_bytes": 6 * 2**30,
    "formula_bytes": 7 * 2**30,
    "host_bytes": 2**35,
    "literal": None,
    "stages": [
        {"name": "masks", "seconds": 3.0},
        {"name": "statistics, candidates", "seconds": 5.0},
        {"name": "ranking", "seconds": 1.5},
    ],
}


def run_script(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The script, whose tests and job fail."""
    stub = folder / "python"
    stub.write_text(STUB)
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    asked = {"PYTHON": str(stub), "CALLS": str(folder / "calls"), "DEVICE": "cpu", "BLOCKS": "--blocks 2"}
    return subprocess.run(
        ["bash", SCRIPT, folder / "out"],
        env=os.environ | asked | more,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )


def calls_in(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """All commands of the script."""
    folder = tmp_path_factory.mktemp("gpu-job")
    done = run_script(folder)
    assert done.returncode == 1, done.stderr
    assert "== job-7b FAILED" in done.stdout
    assert "2 failed;" in done.stdout
    assert (folder / "out" / "gpu.md").is_file()
    return calls_in(folder)


def test_some_steps_alone(tmp_path: Path) -> None:
    done = run_script(tmp_path, STEPS="kernels offload-13b")
    assert done.returncode == 0, done.stderr
    assert [call[2] for call in calls_in(tmp_path)] == ["kernels", "search", "table"]
    assert "13b" in calls_in(tmp_path)[1]


def test_an_unknown_step_is_refused_before_any_is_run(tmp_path: Path) -> None:
    done = run_script(tmp_path, STEPS="kernels offload-8b")
    assert done.returncode == 2
    assert "unknown step offload-8b, expected some of: tests kernels" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_the_tests_come_first_and_the_table_last(calls: list[list[str]]) -> None:
    assert calls[0][:7] == ["-m", "pytest", "-o", "addopts=", "-q", "-m", "gpu"]
    marked = {file for file in TESTS.rglob("test_*.py") if file != Path(__file__) and "mark.gpu" in file.read_text()}
    asked = [TESTS.parent / name for name in calls[0][7:]]
    assert {file for file in marked if any(file.is_relative_to(place) for place in asked)} == marked
    assert calls[-1][:3] == ["-m", "neuronal_ray.benchmark", "table"]
    parts = [call[2] for call in calls[1:]]
    assert parts == ["kernels", "search", "job", "search", "search", "search", "table"]
    assert set(parts) <= set(MEASUREMENTS)


def test_the_benchmark_takes_the_options(calls: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, bool, str]] = []

    def measure_search(setting: Setting, **_: object) -> object:
        asked.append((setting.name, setting.offload, setting.dtype))
        raise KeyboardInterrupt

    def measure_job(name: str, *_: object, dtype: str, **__: object) -> object:
        asked.append((name, False, dtype))
        raise KeyboardInterrupt

    for module in (benchmark_search, benchmark_job):
        monkeypatch.setattr(module, "model_path", lambda name, folder, blocks: folder / f"{name}-{blocks}")
    monkeypatch.setattr(benchmark_search, "measure_search", measure_search)
    monkeypatch.setattr(benchmark_job, "measure_job", measure_job)
    for call in calls[2:-1]:
        assert main(call[2:]) == 130, call
    assert [name for name, _, _ in asked] == ["7b", "7b", "7b", "13b", "70b"]
    assert [offload for _, offload, _ in asked] == [False, False, True, True, True]
    assert {dtype for _, _, dtype in asked} == {"bfloat16"}


def test_the_table_has_the_machine_and_the_figures() -> None:
    lines = benchmark_table.tables([{"machine": MACHINE, "measured": [SEARCH]}] * 2)
    assert lines[0] == "2026-01-01, a GPU, 16 cores (a CPU), 128 GiB; torch 2"
    assert len(lines) == 6, "the machine once, a header, two rows"
    cells = [cell.strip() for cell in lines[-1].split("|")[1:-1]]
    assert cells[:5] == ["7b, 32 blocks, bfloat16, offloaded", "8 x 2048", "30.0 s", "20.0 s", "1.50"]
    assert cells[7:9] == ["25.0%", "1.50 s"]
    assert cells[10:12] == ["6.00 GiB", "7.00 GiB"]
    assert {line.count("|") for line in lines[2:]} == {len(cells) + 1}


def test_another_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text("[1]")
    assert main(["table", str(file)]) == 2
    assert "expected a file that the benchmark wrote" in capsys.readouterr().err
