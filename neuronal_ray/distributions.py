"""The dense model's next-token distributions on a text, and how far a sparse model's are from them."""

import math
from collections.abc import Iterator, Sequence

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from neuronal_ray.core.divergence import divergences, log_probabilities
from neuronal_ray.models.blocks import Recording, Stream

_SLICE = 2**24
"""Logits that exist at a time: a few positions of a sequence for large vocabularies, all of it for small ones."""

_CACHED = 2**28
"""Log-probabilities that are kept (1 GiB); the others cost a product with the head each time."""


class Distributions:
    """The first log-probabilities are kept, the rest computed anew from the last hidden states: the same bits."""

    def __init__(
        self,
        stream: Stream,
        text: Sequence[Int64[Tensor, "sequences length"]],
        dense: Sequence[Recording],
        *,
        slice_size: int = _SLICE,
        cache_size: int = _CACHED,
    ) -> None:
        """`dense` are the hidden states of each chunk of `text` after the dense model's last block; sizes in floats."""
        self._stream, self._text, self._dense = stream, text, dense
        self._slice_size, self._free = slice_size, cache_size
        self._kept: dict[int, Float32[Tensor, "tokens vocabulary"]] = {}

    def divergence(self, sparse: Sequence[Recording]) -> list[float]:
        """Mean KL(dense || sparse) over the positions of each sequence, nats a token; infinite on overflow."""
        means: list[float] = []
        number = 0
        for text, ours, theirs in zip(self._text, self._dense, sparse, strict=True):
            for row in range(len(text)):
                total = 0.0
                for positions in self._slices(text.shape[1]):
                    dense = self._kept.get(number)
                    if dense is None:
                        dense = log_probabilities(self._logits(text, ours, row, positions))
                        if dense.numel() <= self._free:
                            self._kept[number] = dense
                            self._free -= dense.numel()
                    number += 1
                    total += float(divergences(dense, self._logits(text, theirs, row, positions)).sum())
                means.append(total / text.shape[1] if math.isfinite(total) else math.inf)
        return means

    def _slices(self, length: int) -> Iterator[slice]:
        """Runs of positions that together have no more logits than fit in a slice."""
        step = max(1, self._slice_size // self._stream.vocabulary)
        return (slice(start, min(start + step, length)) for start in range(0, length, step))

    def _logits(
        self, text: Int64[Tensor, "sequences length"], recording: Recording, row: int, positions: slice
    ) -> Float[Tensor, "tokens vocabulary"]:
        """The logits at some positions of one sequence of a chunk; the head sees each position by itself."""
        here = Recording(recording.hidden[row : row + 1, positions], recording.calls)
        return self._stream.finish(text[row : row + 1, positions], here)[0]
