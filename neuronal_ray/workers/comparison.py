"""A candidate's activation norms and the dense model's, gathered block after block and compared at the end."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from neuronal_ray.core.alignment import Trial, misalignments, total_misalignment
from neuronal_ray.core.layout import Group, Layout
from neuronal_ray.core.stats import Statistic


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pair:
    """Norms of one input in both models, the number of linears that read it, and the norms of its signal."""

    dense: Float32[Tensor, " columns"]
    sparse: Float32[Tensor, " columns"]
    readers: int
    signal: tuple[Float32[Tensor, " columns"], Float32[Tensor, " columns"]]


class Comparison:
    """Equation 2 over all linears, and the signed differences of norms that the row step reads.

    Nothing is read from the device before the end, so that the device never waits for a candidate's numbers.
    `dead_is_infinite`: the released code divides by the sum of the norms; an input that pruning has silenced makes
    its score NaN.
    """

    def __init__(self, *, dead_is_infinite: bool = False) -> None:
        self._dead_is_infinite = dead_is_infinite
        self._pairs: dict[Group, _Pair] = {}

    def add(
        self, layout: Layout, block: int, dense: Mapping[Group, Statistic], sparse: Mapping[Group, Statistic]
    ) -> None:
        """Add the inputs of one block's linears; an expert that no token was routed to has norms of zero.

        The signal of an input that feeds all experts of a block is that of the inputs of all of them.
        """
        for group, first in layout.first_readers(block).items():
            norms = _norms(first.columns, dense.get(group), sparse.get(group))
            signal = norms
            if group in layout.feeds_experts:
                signal = (merged(dense, layout.routed[group]).norm, merged(sparse, layout.routed[group]).norm)
            readers = len(layout.groups[group])
            self._pairs[group] = _Pair(dense=norms[0], sparse=norms[1], readers=readers, signal=signal)

    def trial(self, divergences: tuple[float, ...] = ()) -> Trial:
        """Return the trial of all blocks together, with the divergences of its next-token distributions."""
        pairs = list(self._pairs.values())
        device = pairs[-1].dense.device  # norms from earlier shards came through the host
        terms = torch.zeros(len(pairs), dtype=torch.float64, device=device)
        for width in {len(pair.dense) for pair in pairs}:
            alike = [number for number, pair in enumerate(pairs) if len(pair.dense) == width]
            dense, sparse = (
                torch.stack([norms.to(device) for norms in side])  # [inputs, columns]
                for side in zip(*((pairs[number].dense, pairs[number].sparse) for number in alike), strict=True)
            )
            values = misalignments(dense, sparse)
            if self._dead_is_infinite:
                values = values.masked_fill(~sparse.any(dim=1), math.inf)
            terms[torch.tensor(alike, device=device)] = values
        total = total_misalignment(terms, [pair.readers for pair in pairs])
        differences = [pair.signal[0] - pair.signal[1] for pair in pairs]
        lengths = [len(difference) for difference in differences]
        on_host = torch.cat([difference.to(device) for difference in differences]).cpu().split(lengths)
        return Trial(
            misalignment=total if math.isfinite(total) else math.inf,
            signals=dict(zip(self._pairs, on_host, strict=True)),
            divergences=divergences,
        )


def _norms(
    columns: int, dense: Statistic | None, sparse: Statistic | None
) -> tuple[Float32[Tensor, " columns"], Float32[Tensor, " columns"]]:
    """Return the norms of an input in both models, zeros where no token reached it."""
    if dense is not None and sparse is not None:
        return dense.norm, sparse.norm
    seen = dense or sparse
    nothing = torch.zeros(columns) if seen is None else torch.zeros_like(seen.norm)
    return (dense.norm if dense else nothing), (sparse.norm if sparse else nothing)


def merged(statistics: Mapping[Group, Statistic], groups: Sequence[Group]) -> Statistic:
    """Return the statistic of the inputs of several experts together, over the sequences of one."""
    seen = [statistics[group] for group in groups if group in statistics]
    assert seen, f"no token reached an expert of block {groups[0].block}"
    total = seen[0]
    for statistic in seen[1:]:
        total = total.merge(statistic)
    return total.over(seen[0].sequences)
