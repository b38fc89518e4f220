"""Does a fault of ours in a candidate show its traceback, keep what is finished and let --resume go on from there?"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.cli import versions
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import Plan
from neuronal_ray.prune import session
from neuronal_ray.prune.__main__ import main as prune

OPTIONS = {"mode": "paper", "block_lambdas": "0.05,0.1,0.2", "row_lambdas": "0,0.1"}
BYTE_EQUAL = ("model.safetensors", "allocation.parquet")
KEPT = "what is finished was kept: the same command with --resume goes on from there"

FAULT = '''
"""Imported by every Python that has this folder on its path: the third candidate of a process fails."""

import importlib.abc
import importlib.util
import sys

MODULE = "neuronal_ray.core.alignment"  # every candidate ends with a Trial


class Planter(importlib.abc.MetaPathFinder):
    """Finds the module as the others do, and adds the fault when it is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        own = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (own(module), plant(module))
        return spec


def plant(module):
    own, candidates = module.Trial.__init__, []

    def planted_fault(*args, **kwargs):
        candidates.append(1)
        if len(candidates) == 3:
            raise KeyError("planted")
        own(*args, **kwargs)

    module.Trial.__init__ = planted_fault


sys.meta_path.insert(0, Planter())
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its texts, what an undisturbed run makes of it, and a module that plants a fault in every Python."""
    folder = tmp_path_factory.mktemp("faults")
    write_model(folder / "model")
    write_texts(folder)
    (folder / "plant").mkdir()
    (folder / "plant" / "sitecustomize.py").write_text(FAULT)
    assert prune(prune_arguments(folder, folder / "whole", **OPTIONS)) == 0
    return folder


def run(folder: Path, output: Path, *, planted: bool, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with or without the fault in it and in the workers that it starts."""
    arguments = prune_arguments(folder, output, **OPTIONS, **changes)
    paths = [str(Path(versions.__file__).parents[2]), *([str(folder / "plant")] if planted else [])]
    return subprocess.run(
        [sys.executable, "-m", "neuronal_ray.prune", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "RAY_USAGE_STATS_ENABLED": "0"},
    )


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"address": "none"}, id="in process"),
        pytest.param({"address": "local", "replicas": "1"}, id="ray", marks=pytest.mark.ray),
    ],
)
def test_a_fault_in_a_candidate(where: dict[str, str], folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    failed = run(folder, output, planted=True, **where)
    assert failed.returncode == 1, failed.stderr
    assert failed.stdout == ""
    lines = failed.stderr.strip().splitlines()
    assert "Traceback (most recent call last):" in lines
    assert any(line.endswith("in planted_fault") for line in lines), "the frame that has the fault"
    assert any("workers/" in line and "in trial" in line for line in lines), "the task that led there"
    assert any("prune/search.py" in line for line in lines), "what in the driver wanted the task"
    if where["address"] == "local":
        assert "ray::ShardActor.call()" in failed.stderr
    assert (
        "item 3 of 3 failed: KeyError: 'planted'" in failed.stderr
        or "item 3 failed: KeyError: 'planted'" in failed.stderr
    )
    assert lines[-1] == f"neuronal-ray prune: internal error (traceback above); {KEPT}"
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
    assert len(list(tmp_path.glob(".out.journal/*/*.safetensors"))) == 2, "the candidates before the fault"
    resumed = run(folder, output, planted=False, resume="", **where)
    assert resumed.returncode == 0, resumed.stderr
    assert "2 finished candidates are taken from" in resumed.stderr
    for name in BYTE_EQUAL:
        assert (output / name).read_bytes() == (folder / "whole" / name).read_bytes(), name
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fault_in_the_driver(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted_fault(plan: Plan, layout: Layout) -> None:
        raise ValueError("planted")

    arguments = prune_arguments(folder, tmp_path / "out", **OPTIONS)
    with monkeypatch.context() as context:
        context.setattr(Plan, "check", planted_fault)
        assert prune(arguments) == 1
    printed = capsys.readouterr().err
    assert "in planted_fault" in printed
    assert printed.strip().splitlines()[-1].endswith(KEPT)
    assert len(list(tmp_path.glob(".out.journal/*/*.safetensors"))) == 4
    assert prune([*arguments, "--resume"]) == 0
    assert "4 finished candidates are taken from" in capsys.readouterr().err
    for name in BYTE_EQUAL:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("changed", ["neuronal_ray", "torch", "transformers"])
def test_scores_of_other_code_are_not_taken_over(
    changed: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = prune_arguments(folder, tmp_path / "out", **OPTIONS)
    with monkeypatch.context() as context:
        context.setattr(Plan, "check", lambda *_: 1 / 0)
        assert prune(arguments) == 1
    own = session.score_versions
    with monkeypatch.context() as context:
        context.setattr(session, "score_versions", lambda *names: own(*names) | {changed: "another"})
        capsys.readouterr()
        assert prune([*arguments, "--resume"]) == 0
    printed = capsys.readouterr().err
    assert "finished candidates are taken" not in printed
    assert re.search(rf"no finished candidate is taken from .*: another {changed}$", printed, flags=re.MULTILINE)
    for name in BYTE_EQUAL:
        assert (tmp_path / "out" / name).read_bytes() == (folder / "whole" / name).read_bytes(), name


def test_a_run_records_the_version_of_its_code(folder: Path) -> None:
    recorded = json.loads((folder / "whole" / "pruning.json").read_text())["versions"]["neuronal_ray"]
    assert recorded == versions.code_version()
