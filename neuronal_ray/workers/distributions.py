"""The dense model's next-token distributions on a text, and the divergence of a sparse model's from them."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from jaxtyping import Float, Float32, Int64
from torch import Tensor

from neuronal_ray.core.divergence import divergences, log_probabilities
from neuronal_ray.models.blocks import Recording, Stream

_SLICE = 2**24
"""The most logits in memory at a time: a few positions of a sequence for large vocabularies, all for small ones."""

_CACHED = 2**28
"""The most log-probabilities that are cached (1 GiB); the others cost a product with the head each time."""


class Distributions:
    """Caches the first log-probabilities; the rest are computed anew from hidden states, with the same bits."""

    def __init__(
        self,
        text: Sequence[Int64[Tensor, "sequences length"]],
        dense: Sequence[Recording],
        *,
        slice_size: int = _SLICE,
        cache_size: int = _CACHED,
    ) -> None:
        """Take the hidden states of each chunk of `text` after the dense model's last block; sizes count floats."""
        self._text, self._dense = text, dense
        self._slice_size, self._free = slice_size, cache_size
        self._kept: dict[int, Float32[Tensor, "tokens vocabulary"]] = {}
        self._lock = threading.Lock()

    def divergence(self, sparse: Sequence[Recording], stream: Stream) -> list[float]:
        """Return the mean KL(dense || sparse) over the positions of each sequence, nats a token; infinite on overflow.

        `stream` has the head; no other thread uses it at the same time.
        """
        means: list[float] = []
        number = 0
        for text, dense_end, sparse_end in zip(self._text, self._dense, sparse, strict=True):
            for row in range(len(text)):
                total = 0.0
                for positions in self._slices(text.shape[1], stream.vocabulary):
                    size = (positions.stop - positions.start) * stream.vocabulary
                    logits = partial(_logits, stream, text, row, positions)
                    dense = self._log_probabilities(number, size, partial(logits, dense_end))
                    number += 1
                    total += float(divergences(dense, logits(sparse_end)).sum())
                means.append(total / text.shape[1] if math.isfinite(total) else math.inf)
        return means

    def _log_probabilities(
        self, number: int, size: int, logits: Callable[[], Float[Tensor, "tokens vocabulary"]]
    ) -> Float32[Tensor, "tokens vocabulary"]:
        """Return the dense model's for slice `number`; the first thread computes those that are cached, others wait."""
        with self._lock:
            if number not in self._kept and size <= self._free:
                self._kept[number] = log_probabilities(logits())
                self._free -= size
            kept = self._kept.get(number)
        return log_probabilities(logits()) if kept is None else kept

    def _slices(self, length: int, vocabulary: int) -> Iterator[slice]:
        """Return ranges of positions that have no more logits than one slice."""
        step = max(1, self._slice_size // vocabulary)
        return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _logits(
    stream: Stream, text: Int64[Tensor, "sequences length"], row: int, positions: slice, recording: Recording
) -> Float[Tensor, "tokens vocabulary"]:
    """Return the logits at some positions of one sequence of a chunk; the head treats each position by itself."""
    selected = Recording(recording.hidden[row : row + 1, positions], recording.calls)
    return stream.finish(text[row : row + 1, positions], selected)[0]
