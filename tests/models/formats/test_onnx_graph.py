"""An exported graph generates the same tokens as transformers; other models are refused in one line."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models.checkpoint import load_model, open_checkpoint
from neuronal_ray.models.formats import onnx_graph as onnx_export
from neuronal_ray.models.formats.onnx_graph import FILE, check_onnx, export_onnx


def test_a_model_with_grouped_queries_generates_the_same_tokens(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    path = checkpoint_dir("llama")
    with caplog.at_level(logging.WARNING, logger="neuronal_ray"):
        export_onnx(path, tmp_path)
    assert not caplog.records
    assert {"model.onnx", "model.onnx.data", "config.json"} <= {file.name for file in tmp_path.iterdir()}
    model = load_model(open_checkpoint(path), device=torch.device("cpu"), dtype=torch.float32)
    assert check_onnx(model, tmp_path / FILE) < 1e-4
    model.lm_head.weight.data = model.lm_head.weight.data.roll(1, dims=0)
    with pytest.raises(UnsupportedModel, match="generates token"):
        check_onnx(model, tmp_path / FILE)


def test_a_sliding_window_is_refused(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    with pytest.raises(UnsupportedModel, match="not sliding windows"):
        export_onnx(checkpoint_dir("mistral"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnx_export, "find_spec", lambda name: None if name == "onnx" else importlib.util.find_spec(name)
    )
    with pytest.raises(BadInput, match=r"needs onnx.*pip install 'neuronal_ray\[inference\]'"):
        export_onnx(tmp_path, tmp_path)
