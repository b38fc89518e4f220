"""Export to an ONNX graph that generates text: from tokens and a key/value cache to logits and the extended cache."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models.checkpoint import load_model, open_checkpoint, quiet_loading
from neuronal_ray.models.companion_files import copy_companions
from neuronal_ray.models.hub import first_line

logger = logging.getLogger(__name__)

FILE = "model.onnx"
PAST, PRESENT = "past_key_values.", "present."
"""Prefixes of the names of the cache's inputs and outputs; `N.key` and `N.value` follow."""
_OPSET = 18  # the oldest that the exporter supports, for old runtimes
_STEPS = 8
_PAST, _NEW, _SEQUENCES = 5, 3, 2
_TIE = 1e-4  # of the largest logit: two logits closer than this are a tie in float32


def check_needs() -> None:
    """Raise BadInput when the exporter is not installed."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise BadInput(f"--format onnx: needs {' and '.join(missing)}; pip install 'neuronal_ray[inference]'")


def export_onnx(model_dir: Path, output: Path) -> None:
    """Write FILE, the file of its weights, configuration and tokenizer to the existing directory `output`.

    The graph is in float32, from transformers' exporter. Inputs are `input_ids`, `attention_mask`, `position_ids`,
    `past_key_values.N.key` and `.value` [sequences, heads, past, features], where past may be 0; outputs are `logits`,
    `present.N.key` and `.value`. It is checked against transformers' greedy generation if onnxruntime is installed.
    Raises BadInput without onnx and onnxscript, UnsupportedModel for a model that the exporter cannot trace, whose
    cache is of another kind (sliding windows) or that generates other tokens once exported.
    """
    check_needs()
    checkpoint = open_checkpoint(model_dir)
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    _write(model, output / FILE)
    copy_companions(model_dir, output)
    if find_spec("onnxruntime") is None:
        logger.warning("%s is not checked against transformers: onnxruntime is not installed", FILE)
    else:
        check_onnx(model, output / FILE)


def _write(model: PreTrainedModel, path: Path) -> None:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    tokens = torch.arange(_SEQUENCES * (_PAST + _NEW)).view(_SEQUENCES, -1) % model.config.get_text_config().vocab_size
    past, new = tokens.split((_PAST, _NEW), dim=1)
    positions = torch.arange(_PAST + _NEW).expand(_SEQUENCES, -1)
    with torch.no_grad():
        cache = model(past, use_cache=True).past_key_values
    inputs = {
        "input_ids": new,
        "attention_mask": torch.ones_like(tokens),
        "position_ids": positions[:, _PAST:],
        "past_key_values": cache,
        "use_cache": True,
    }
    changing = torch.export.Dim.AUTO
    rows = {0: changing, 1: changing}
    shapes = {
        "input_ids": rows,
        "attention_mask": rows,
        "position_ids": rows,
        "past_key_values": [{0: changing, 2: changing}] * (2 * len(cache.layers)),
    }
    kinds = {type(layer).__name__ for layer in cache.layers}
    if kinds != {"DynamicLayer"}:
        raise UnsupportedModel(
            f"--model: {type(model).__name__} has a cache of {', '.join(sorted(kinds))}; only caches that keep every "
            "token can be exported to ONNX, not sliding windows"
        )
    config = OnnxConfig(dynamic_shapes=shapes, opset_version=_OPSET)
    try:
        with _quiet():
            program = OnnxExporter().export(model, inputs, config=config).program
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise UnsupportedModel(
            f"--model: {type(model).__name__} cannot be exported to ONNX: {first_line(error)}"
        ) from error
    for values, prefix in ((program.graph.inputs, PAST), (program.graph.outputs, PRESENT)):
        for value in values:
            if value.name.endswith((".keys", ".values")):
                *_, layer, kind = value.name.split(".")
                value.name = f"{prefix}{layer}.{kind.removesuffix('s')}"
    OnnxExporter.save_program(program, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's prints, logs and warnings."""
    torch_logger = logging.getLogger("torch.onnx")
    level = torch_logger.level
    torch_logger.setLevel(logging.ERROR)
    try:
        with quiet_loading(), warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch_logger.setLevel(level)


def check_onnx(model: PreTrainedModel, path: Path) -> float:
    """Generate greedily with the model and its graph, token by token; return the largest difference of the logits.

    Raises UnsupportedModel when they choose different tokens that are no tie, or if onnxruntime cannot run the graph.
    """
    import numpy as np
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no other class in common
        raise UnsupportedModel(
            f"--model: onnxruntime cannot run {type(model).__name__} as exported: {first_line(error)}"
        ) from error
    names, outputs = {value.name for value in session.get_inputs()}, [value.name for value in session.get_outputs()]
    caches = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith(PAST)
    }
    tokens = torch.arange(1, _PAST + 1)[None].mul(7).remainder(model.config.get_text_config().vocab_size)
    cache, seen, largest = None, 0, 0.0
    for step in range(_STEPS):
        with torch.no_grad():
            reference = model(tokens[:, seen:], past_key_values=cache, use_cache=True)
        cache, logits = reference.past_key_values, reference.logits[0, -1]
        feed = caches | {
            "input_ids": tokens[:, seen:].numpy(),
            "attention_mask": np.ones(tokens.shape, np.int64),
            "position_ids": np.arange(seen, tokens.shape[1])[None],
        }
        values = session.run(None, {name: value for name, value in feed.items() if name in names})
        results = dict(zip(outputs, values, strict=True))
        exported = torch.from_numpy(results.pop("logits"))[0, -1]
        caches = {PAST + name.removeprefix(PRESENT): value for name, value in results.items()}
        largest = max(largest, float((exported - logits).abs().max()))
        chosen, expected = int(exported.argmax()), int(logits.argmax())
        if chosen != expected and float(logits[expected] - logits[chosen]) > _TIE * float(logits.abs().max()):
            raise UnsupportedModel(
                f"--model: {type(model).__name__} as exported generates token {chosen} where transformers generates "
                f"{expected}, at step {step}"
            )
        seen = tokens.shape[1]
        tokens = torch.cat([tokens, torch.tensor([[expected]])], dim=1)
    return largest
