"""DLP: blocks with a low median score keep more of their weights."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import LinearData
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Terms
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum

_SLAB_SIZE = 2**18  # weights per slab: it stays in a processor's cache, and is large next to its histogram
_HALF = 16
_HALF_BINS = 2**_HALF
_INFINITE = 0x7F80  # upper half of the bits of infinity; those of NaN are larger


def allocate(problem: Problem, *, alpha: float = 0.15) -> Allocation:
    """Spread block densities over a width of 2 * alpha, falling with the block's median score m_b.

    Chen et al., DLP: Dynamic Layerwise Pruning in Large Language Models, ICML 2025: the median of a block's scores is
    its unimportance, density ~ 1 - m_b / sum m.
    The authors' code has no upper bound: at high targets a block may lose all weights.
    Differs: equal medians give the target everywhere instead of 0 / 0.
    """
    check(problem, alpha=alpha)
    medians = problem.probe.measure(median_score)
    for block, median in enumerate(medians):
        if not math.isfinite(median):
            raise BadInput(f"--model: NaN or infinite weights or activations in block {block}")
    # Min-max scaling cancels the sum of the medians, a positive factor, and the 1 that they are subtracted from.
    density = spread(-torch.tensor(medians, dtype=torch.float64), lam=alpha, mean=1 - problem.target)
    by_block = (1 - density).tolist()
    rates = uniform_rates(problem.layout, lambda block: by_block[block])
    return Allocation(plan=problem.plan(rates, rows_adapted=False), rates=rates)


def check(terms: Terms, *, alpha: float = 0.15) -> None:
    """Raise BadInput for settings out of range."""
    if not 0 <= alpha <= 1:
        raise BadInput(f"--set allocation.alpha: {alpha}, expected a number from 0 to 1")


def median_score(linears: Sequence[LinearData]) -> float:
    """Return m_b, the median of the scores |W_ij| * a_j of all linears of a block; NaN if a score is not finite.

    Of an even number of scores the lower of the two in the middle, as torch.median has it. The median is exact without
    holding the block's scores in memory: floats from 0 on are ordered as the integers of their bits, so one pass finds
    the upper half of the median's bits and another pass the lower half.
    """
    position = (sum(linear.spec.size for linear in linears) - 1) // 2
    counts = _histogram(linears, lambda bits: bits >> _HALF)
    if bool(counts[_INFINITE:].any()):
        return math.nan
    upper, before = _bin_of(counts, position)
    counts = _histogram(linears, lambda bits: bits[bits >> _HALF == upper] & (_HALF_BINS - 1))
    lower, _ = _bin_of(counts, position - before)
    return float(torch.tensor(upper << _HALF | lower, dtype=torch.int32).view(torch.float32))


def _histogram(
    linears: Sequence[LinearData], half: Callable[[Int32[Tensor, " weights"]], Int32[Tensor, " chosen"]]
) -> Int64[Tensor, " bins"]:
    """Return how often each value of `half` of a score's bits occurs in the block, int64 [65536]."""
    counts = torch.zeros(_HALF_BINS, dtype=torch.int64, device=linears[0].weight.device)
    for bits in _score_bits(linears):
        counts += half(bits).bincount(minlength=_HALF_BINS)
    return counts


def _bin_of(counts: Int64[Tensor, " bins"], position: int) -> tuple[int, int]:
    """Return the bin of the item at `position` in ascending order, and the number of items in the bins below."""
    below = counts.cumsum(0)
    found = int((below <= position).count_nonzero())
    return found, int(below[found] - counts[found])


def _score_bits(linears: Sequence[LinearData]) -> Iterator[Int32[Tensor, " weights"]]:
    """Yield the bits of Wanda's scores, some rows at a time: computing them twice is faster than storing them."""
    for linear in linears:
        assert linear.inputs is not None, linear.spec.linear
        norm = linear.inputs.norm
        for slab in linear.weight.split(max(1, _SLAB_SIZE // linear.spec.columns)):
            yield slab.float().abs().mul_(norm).flatten().view(torch.int32)  # [rows, columns] -> [weights]


ALLOCATION = Allocator(allocate=allocate, statistic=SquareSum, check=check)
