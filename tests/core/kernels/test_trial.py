"""Kernels that cannot run are replaced by torch's operations, with one warning however often they are asked for."""

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.core.kernels.trial import tried_once


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify one"), "Failed to find C compiler."),
        (subprocess.CalledProcessError(1, ["cc", "main.c"]), "Command '['cc', 'main.c']' returned non-zero exit"),
        (ImportError(), "ImportError"),
    ],
)
def test_a_failure_is_said_once_and_tried_once(error: Exception, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    attempts = []

    @tried_once("the kernels of this test")
    def make_ready(device: str) -> str:
        attempts.append(device)
        raise error

    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(4) as threads:
        assert list(threads.map(make_ready, ["cuda:0"] * 8)) == [None] * 8
    assert attempts == ["cuda:0"], attempts
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"the kernels of this test: {reason}"), said
    assert "torch's own operations" in said
    assert "\n" not in said


def test_what_works_is_made_once_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    made = []

    @tried_once("the kernels of this test")
    def make_ready(device: str) -> str:
        made.append(device)
        return device

    assert [make_ready("cuda:0"), make_ready("cuda:0"), make_ready("cuda:1")] == ["cuda:0", "cuda:0", "cuda:1"]
    assert made == ["cuda:0", "cuda:1"]
    assert not caplog.records


@pytest.mark.parametrize("missing", ["compiler", "place for what it compiles"])
def test_a_model_is_pruned_without_compiled_kernels(missing: str, tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    (tmp_path / "a file").touch()
    changes = {"compiler": {"PATH": "", "CC": "no-compiler", "XDG_CACHE_HOME": str(tmp_path / "cache")}}
    changes["place for what it compiles"] = {"XDG_CACHE_HOME": str(tmp_path / "a file")}
    words = prune_arguments(tmp_path, tmp_path / "pruned", allocation="besa", set="allocation.per=linear")
    done = subprocess.run(
        [sys.executable, "-m", "neuronal_ray.prune", *words],
        env=os.environ | changes[missing],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "torch's own operations" in line]
    assert len(said) == 1, done.stderr
    assert json.loads((tmp_path / "pruned" / "pruning.json").read_text())["sparsity"]["achieved"] > 0
