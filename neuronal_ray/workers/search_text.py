"""The text that candidates are compared on: its embeddings, and the dense model's next-token distributions."""

from collections.abc import Sequence

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.distributions import Distributions
from neuronal_ray.workers.replica import Replica


class SearchText:
    """Sequences in chunks, as they enter the first block; the distributions are computed on first use."""

    def __init__(
        self, replica: Replica, tokens: Int64[Tensor, "sequences length"], *, chunk: int | None = None
    ) -> None:
        self.tokens = tokens
        self.chunks, self.recordings = replica.start(tokens, chunk=chunk)
        self._distributions: Distributions | None = None

    def keep_dense_end(self, recordings: Sequence[Recording]) -> None:
        """Keep the text as it leaves the dense model's last block; in earlier shards there is none."""
        self._distributions = Distributions(self.chunks, recordings) if recordings else None

    def divergence(self, sparse: Sequence[Recording], replica: Replica) -> tuple[float, ...]:
        """Return the mean KL(dense || sparse) of each sequence, nats a token; `sparse` has left the last block."""
        assert self._distributions is not None, "the search text was set without the dense model's reference"
        with replica.stopwatch.measure("divergence"):
            return tuple(self._distributions.divergence(sparse, replica.stream))
