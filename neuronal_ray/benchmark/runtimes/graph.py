"""Greedy generation with an exported ONNX graph, in any runtime."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64] | NDArray[np.float32]
Tokens = NDArray[np.int64]
PAST, PRESENT = "past_key_values.", "present."


class GraphSession(ABC):
    """A Session; a runtime adds how the graph is run. `names`: all inputs; `caches`: the cache's heads and features."""

    def __init__(self, names: set[str], caches: Mapping[str, tuple[int, int]]) -> None:
        self._names, self._shapes = names, caches
        self._cache: dict[str, Array] = {}
        self._seen = 0

    def prefill(self, tokens: Tokens) -> Tokens:
        """See Session."""
        self._seen = 0
        self._cache = {
            name: np.zeros((len(tokens), heads, 0, features), np.float32)
            for name, (heads, features) in self._shapes.items()
        }
        return self._step(tokens)

    def decode(self, tokens: Tokens) -> Tokens:
        """See Session."""
        return self._step(tokens[:, None])

    @abstractmethod
    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph; return the outputs by name."""

    def _step(self, tokens: Tokens) -> Tokens:
        sequences, length = tokens.shape
        positions = np.arange(self._seen, self._seen + length, dtype=np.int64)
        feed: dict[str, Array] = {
            "input_ids": tokens,
            "attention_mask": np.ones((sequences, self._seen + length), np.int64),
            "position_ids": np.broadcast_to(positions, tokens.shape),
        }
        found = self.run({name: value for name, value in (feed | self._cache).items() if name in self._names})
        self._cache = {
            PAST + name.removeprefix(PRESENT): value for name, value in found.items() if name.startswith(PRESENT)
        }
        self._seen += length
        chosen: Tokens = found["logits"][:, -1].argmax(axis=-1)
        return chosen
