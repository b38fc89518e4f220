"""A cell that fails is reported, by a traceback if the error is ours, and the others go on; --resume runs it again."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from ray._private.services import find_gcs_addresses

import neuronal_ray.sweep.__main__
from neuronal_ray.algorithms.allocations import owl
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.report.inputs import read_results

BLOCKS = 3
PLANT = """
import dataclasses, inspect, sys
from neuronal_ray.algorithms.allocations import owl
from neuronal_ray.sweep.__main__ import main
allocate = owl.allocate
def broken_task(linears):
    return {}["planted"]
def planted(problem, **settings):
    if problem.layout.num_blocks == 3:
        problem.probe.measure(broken_task)
    return allocate(problem, **settings)
planted.__signature__ = inspect.signature(allocate)
owl.ALLOCATION = dataclasses.replace(owl.ALLOCATION, allocate=planted)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failures")
    tiny.write_model(folder / "model")
    tiny.write_texts(folder)
    path = folder / "sweep.toml"
    path.write_text(f"""
        [options]
        model = "{folder / "model"}"
        calibration = "{folder / "calibration.txt"}"
        evaluate = ["{folder / "evaluation.txt"}"]
        calibration-samples = 6
        search-samples = 2
        sequence-length = {tiny.LENGTH}
        threads = 1
        mode = "paper"
        address = "none"
        [grid]
        sparsity = [0.5, 0.7]
        [[variant]]
        name = "Uniform"
        allocation = "uniform"
        [[variant]]
        name = "OWL"
        allocation = "owl"
    """)
    return path


def run(file: Path, output: Path, *words: str) -> int:
    return neuronal_ray.sweep.__main__.main([str(file), "--output", str(output), *words])


def values(output: Path) -> dict[tuple[str, float], float | None]:
    return {(row.variant, row.sparsity): row.value for row in read_results([output]) if row.method != "dense"}


def broken(*_: object) -> object:
    empty: dict[str, object] = {}
    return empty["planted"]


def in_the_driver(problem: Any) -> None:
    broken()


def in_a_task(problem: Any) -> None:
    problem.probe.measure(broken)


def bad_input(problem: Any) -> None:
    raise BadInput("--set allocation.lam: planted")


def plant(context: pytest.MonkeyPatch, failure: Callable[[Any], None]) -> None:
    """Let OWL fail on the model at 70 %, and nowhere else."""
    allocate = owl.allocate

    def planted(problem: Any, *, lam: float = 0.08, threshold: float = 5.0) -> Any:
        if problem.layout.num_blocks == BLOCKS and problem.target > 0.6:
            failure(problem)
        return allocate(problem, lam=lam, threshold=threshold)

    context.setattr(owl, "ALLOCATION", replace(owl.ALLOCATION, allocate=planted))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nope", "'nope' is not an address"),
        ("127.0.0.1:9", "nothing to join at '127.0.0.1:9'"),
        ("ray://127.0.0.1:9", "nothing to join at 'ray://127.0.0.1:9'"),
        ("auto", "nothing to join at '"),  # and the machine's own address
    ],
)
def test_an_address_without_a_ray_is_refused_before_anything_is_written(
    address: str,
    said: str,
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`auto` means the Ray that the machine remembers, which is gone here."""
    if address == "auto" and find_gcs_addresses():
        pytest.skip("a Ray is running on this machine")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:9")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run(file, tmp_path / "runs", "--address", address) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--address: {said}" in line
    assert [path.name for path in tmp_path.iterdir()] == ["ray"], line


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("failure", [in_the_driver, in_a_task, bad_input])
def test_a_failed_cell_is_reported_and_run_again(
    failure: Callable[[Any], None],
    file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as context:
        plant(context, failure)
        assert run(file, tmp_path / "runs") == 1
    printed = capsys.readouterr().err
    ours = failure is not bad_input
    assert printed.count("\nKeyError: 'planted'\n") == ours, printed  # the last line of its traceback
    assert printed.count('empty["planted"]') == ours, printed
    assert ("Traceback" in printed) == ours
    summary = [line for line in printed.splitlines() if line.startswith("neuronal-ray sweep: failed: ")]
    assert len(summary) == 1
    assert "model wanda OWL 0.7 seed 0" in summary[0]
    assert "planted" in summary[0]
    assert "1 cells failed; --resume tries them again" in printed
    before = values(tmp_path / "runs")
    assert before.keys() == {("Uniform", 0.5), ("Uniform", 0.7), ("OWL", 0.5)}
    journal = (tmp_path / "runs" / "journal.jsonl").read_bytes()

    assert run(file, tmp_path / "runs", "--resume") == 0
    assert (tmp_path / "runs" / "journal.jsonl").read_bytes().startswith(journal)
    assert "1 cells done, 3 were done before, 0 failed" in capsys.readouterr().out
    assert run(file, tmp_path / "whole") == 0
    after = values(tmp_path / "runs")
    assert after == values(tmp_path / "whole")
    assert {key: after[key] for key in before} == before


@pytest.mark.usefixtures("one_thread")
def test_a_model_that_cannot_be_loaded_fails_its_own_cells_alone(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from neuronal_ray.sweep import pipeline

    opened = pipeline.open_pool

    def failing(config: Any, *args: Any, **kwargs: Any) -> Any:
        return broken() if config.dtype == "bfloat16" else opened(config, *args, **kwargs)

    monkeypatch.setattr(pipeline, "open_pool", failing)
    words = ["--option", 'dtype=["float32", "bfloat16"]', "--option", "sparsity=0.7"]
    assert run(file, tmp_path / "runs", *words) == 1
    assert values(tmp_path / "runs").keys() == {("Uniform", 0.7), ("OWL", 0.7)}
    printed = capsys.readouterr().err
    assert printed.count("\nKeyError: 'planted'\n") == 1
    assert len([line for line in printed.splitlines() if line.startswith("neuronal-ray sweep: failed: ")]) == 2


@pytest.mark.ray
def test_the_traceback_of_a_worker_on_ray_is_printed_once(file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PLANT, str(file), "--output", str(tmp_path / "runs")]
    finished = subprocess.run(
        [*command, "--address", "local", "--replicas", "1", "--option", "sparsity=0.7"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert finished.returncode == 1, finished.stderr
    assert finished.stderr.count("\nKeyError: 'planted'\n") == 1, finished.stderr
    assert finished.stderr.count("in broken_task") == 1, finished.stderr
    assert "1 cells done, 0 were done before, 1 failed" in finished.stdout


@pytest.mark.parametrize("largest", [100, 700, 4000])
def test_a_full_disk_is_one_line_and_the_sweep_is_resumed(file: Path, tmp_path: Path, largest: int) -> None:
    whole, output = tmp_path / "whole", tmp_path / "new" / "out"
    assert neuronal_ray.sweep.__main__.main([str(file), "--output", str(whole)]) == 0
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = subprocess.run(
        [sys.executable, "-m", "neuronal_ray.sweep", str(file), "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, usual[1])),
    )
    assert run.returncode == 1, run.stderr
    assert "File too large" in run.stderr, run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    assert (tmp_path / "new").exists() == (output / "sweep.json").is_file(), "nothing is left, or it can be resumed"
    assert neuronal_ray.sweep.__main__.main([str(file), "--output", str(output), "--resume"]) == 0
    rows = [{(row.cell, row.evaluation): row.value for row in read_results([path])} for path in (whole, output)]
    assert rows[0] == rows[1]
