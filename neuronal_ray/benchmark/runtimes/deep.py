"""Generation by DeepSparse 1.8, which needs fixed shapes: an engine per shape, and a cache of constant length."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from deepsparse import Engine

from neuronal_ray.benchmark.runtimes import Opening
from neuronal_ray.benchmark.runtimes.graph import PAST, PRESENT, Array, Tokens

_IR_VERSION = 8  # the newest that its onnx and its reader know


class DeepSparseSession:
    """A Session whose cache always has room for the longest sequence; positions not reached yet are masked."""

    def __init__(self, opening: Opening) -> None:
        self._path, self._threads, self._window = opening.path, opening.threads, opening.length
        self._graph = onnx.load(str(opening.path), load_external_data=False)
        self._graph.ir_version = _IR_VERSION
        self._inputs = [value.name for value in self._graph.graph.input]
        self._outputs = [value.name for value in self._graph.graph.output]
        self._engines: dict[tuple[int, int], Engine] = {}
        self._cache: dict[str, Array] = {}
        self._seen = 0
        self._engine(1, 1)  # the first that a round needs, so that it counts as loading

    def prefill(self, tokens: Tokens) -> Tokens:
        """See Session."""
        self._engines = {key: engine for key, engine in self._engines.items() if key[0] == len(tokens)}
        self._seen = 0
        self._cache = {
            value.name: np.zeros(self._shape(value, len(tokens), 0), np.float32)
            for value in self._graph.graph.input
            if value.name.startswith(PAST)
        }
        return self._step(tokens)

    def decode(self, tokens: Tokens) -> Tokens:
        """See Session."""
        return self._step(tokens[:, None])

    def _step(self, tokens: Tokens) -> Tokens:
        sequences, length = tokens.shape
        mask = np.zeros((sequences, self._window + length), np.int64)
        mask[:, self._window - self._seen :] = 1
        positions = np.arange(self._seen, self._seen + length, dtype=np.int64)
        feed: Mapping[str, Array] = self._cache | {
            "input_ids": tokens,
            "attention_mask": mask,
            "position_ids": np.tile(positions, (sequences, 1)),
        }
        inputs = [np.ascontiguousarray(feed[name]) for name in self._inputs]
        found = dict(zip(self._outputs, self._engine(sequences, length).run(inputs, val_inp=False), strict=True))
        self._cache = {
            PAST + name.removeprefix(PRESENT): value[:, :, -self._window :]
            for name, value in found.items()
            if name.startswith(PRESENT)
        }
        self._seen += length
        chosen: Tokens = found["logits"][:, -1].argmax(axis=-1)
        return chosen

    def _engine(self, sequences: int, length: int) -> Engine:
        key = (sequences, length)
        if key not in self._engines:
            fixed = onnx.ModelProto()
            fixed.CopyFrom(self._graph)
            for value in fixed.graph.input:
                shape = self._shape(value, sequences, length)
                for dimension, size in zip(value.type.tensor_type.shape.dim, shape, strict=True):
                    dimension.dim_value = size
            del fixed.graph.value_info[:]
            for value in fixed.graph.output:
                for dimension in value.type.tensor_type.shape.dim:
                    if dimension.dim_param:
                        dimension.Clear()
            file = Path(self._path).with_name(f"deepsparse-{sequences}-{length}.onnx")  # next to the weights
            onnx.save(fixed, str(file))
            self._engines[key] = Engine(str(file), batch_size=sequences, num_cores=self._threads)
            file.unlink()
        return self._engines[key]

    def _shape(self, value: onnx.ValueInfoProto, sequences: int, length: int) -> tuple[int, ...]:
        if value.name.startswith(PAST):
            sizes = [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            return (sequences, sizes[1], self._window, sizes[3])
        return (sequences, self._window + length if value.name == "attention_mask" else length)


def open_session(opening: Opening) -> DeepSparseSession:
    """Open a graph that `export --format onnx` wrote."""
    return DeepSparseSession(opening)
