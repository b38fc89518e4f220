"""One candidate's activations beside the dense model's, block after block, until they make a Trial."""

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from neuronal_ray.core.alignment import Trial, misalignment, total_misalignment
from neuronal_ray.core.layout import Group, Layout
from neuronal_ray.core.stats import Statistic


class Comparison:
    """Equation 2 over all linears, and the signed differences of the norms that the row step reads.

    `dead_is_infinite`: the released code divides by the sum of the norms; an input that pruning has silenced makes
    its score NaN.
    """

    def __init__(self, *, dead_is_infinite: bool = False) -> None:
        self._dead_is_infinite = dead_is_infinite
        self._terms: list[tuple[Float64[Tensor, ""], int]] = []
        self._signals: dict[Group, Float32[Tensor, " columns"]] = {}

    def add(
        self, layout: Layout, block: int, dense: Mapping[Group, Statistic], sparse: Mapping[Group, Statistic]
    ) -> None:
        """Compare the inputs of one block's linears; an expert that no token was routed to has norms of zero.

        What feeds all experts of a block is judged by the inputs of all of them.
        """
        for group, first in layout.first_readers(block).items():
            seen = dense.get(group) or sparse.get(group)
            nothing = torch.zeros(first.columns) if seen is None else torch.zeros_like(seen.norm)
            ours, theirs = (found[group].norm if group in found else nothing for found in (dense, sparse))
            term = misalignment(ours, theirs)
            dead = self._dead_is_infinite and not bool(theirs.any())
            readers = len(layout.groups[group])
            self._terms.append((torch.full_like(term, math.inf) if dead else term, readers))
            if group in layout.feeds_experts:
                ours, theirs = (merged(found, layout.routed[group]).norm for found in (dense, sparse))
            self._signals[group] = (ours - theirs).cpu()

    def trial(self, divergences: tuple[float, ...] = ()) -> Trial:
        """What all blocks together gave, and the last hidden states (see Trial)."""
        device = self._terms[-1][0].device  # those of earlier shards came by the host
        total = total_misalignment([(term.to(device), count) for term, count in self._terms])
        return Trial(
            misalignment=total if math.isfinite(total) else math.inf, signals=self._signals, divergences=divergences
        )


def merged(statistics: Mapping[Group, Statistic], groups: Sequence[Group]) -> Statistic:
    """What was seen of the inputs of several experts together, over the sequences of one."""
    seen = [statistics[group] for group in groups if group in statistics]
    assert seen, f"no token reached an expert of block {groups[0].block}"
    found = seen[0]
    for statistic in seen[1:]:
        found = found.merge(statistic)
    return found.over(seen[0].sequences)
