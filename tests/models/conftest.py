"""Checkpoints for the tests of models: one to be damaged, and one of several files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel


@pytest.fixture
def folder(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """Copy a LLaMA checkpoint, to be damaged."""
    path = tmp_path / "damaged"
    shutil.copytree(checkpoint_dir("llama"), path)
    return path


@pytest.fixture
def sharded(make_model: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """Save a LLaMA checkpoint of several files."""
    path = tmp_path / "sharded"
    make_model("llama").save_pretrained(path, max_shard_size="20KB")
    return path
