"""OWL: blocks with more outlying scores keep more of their weights."""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import LinearData
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Terms
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum

_LOWEST, _HIGHEST = 0.01, 0.99
_SLAB_SIZE = 2**18  # weights per slab: small enough for a processor's cache


def allocate(problem: Problem, *, threshold: float = 5.0, lam: float = 0.08) -> Allocation:
    """Spread block densities over a width of 2 * lam, rising with the block's share of scores above threshold * mean.

    Yin et al., OWL, ICML 2024, section 3 (`threshold` is its M). `authors`: a rate of 0 or less becomes 0.01, of 1 or
    more 0.99, as in NeuronAL's code. OWL's own code has no upper bound: at high targets a block may lose all weights.
    Differs: equal shares give the target everywhere; the released code divides 0 by 0.
    """
    check(problem, threshold=threshold, lam=lam)
    shares = problem.probe.measure(partial(outlier_share, threshold=threshold))
    for block, share in enumerate(shares):
        if not math.isfinite(share):
            raise BadInput(f"--model: NaN or infinite weights or activations in block {block}")
    density = spread(torch.tensor(shares, dtype=torch.float64), lam=lam, mean=1 - problem.target)
    sparsity = 1 - density  # [blocks]
    if problem.mode == "authors":
        sparsity = torch.where(sparsity <= 0, _LOWEST, torch.where(sparsity >= 1, _HIGHEST, sparsity))
    by_block = sparsity.tolist()
    rates = uniform_rates(problem.layout, lambda block: by_block[block])
    return Allocation(plan=problem.plan(rates, rows_adapted=False), rates=rates)


def check(terms: Terms, *, threshold: float = 5.0, lam: float = 0.08) -> None:
    """Raise BadInput for settings out of range."""
    if not 0 < threshold < math.inf:
        raise BadInput(f"--set allocation.threshold: {threshold}, expected a positive number")
    if not 0 <= lam <= 1:
        raise BadInput(f"--set allocation.lam: {lam}, expected a number from 0 to 1")


def outlier_share(linears: Sequence[LinearData], *, threshold: float) -> float:
    """Return D_b, the percentage of a block's scores |W_ij| * a_j above threshold * mean; NaN for a mean not finite.

    The sum is taken in float64, so that the order of summation does not matter; the mean and the limit are float32, as
    in the released code. A score equal to the limit does not count.
    """
    size = sum(linear.spec.size for linear in linears)
    total = torch.stack([slab.sum(dtype=torch.float64) for slab in _scores(linears)]).sum()
    limit = (total / size).float() * threshold
    if not bool(limit.isfinite()):
        return math.nan
    count = torch.stack([(slab > limit).count_nonzero() for slab in _scores(linears)]).sum()
    return int(count) / size * 100


def _scores(linears: Sequence[LinearData]) -> Iterator[Float32[Tensor, "rows columns"]]:
    """Yield Wanda's scores of a block, some rows at a time: computing them twice is faster than storing them."""
    for linear in linears:
        assert linear.inputs is not None, linear.spec.linear
        norm = linear.inputs.norm
        for slab in linear.weight.split(max(1, _SLAB_SIZE // linear.spec.columns)):
            yield slab.float().abs().mul_(norm)


ALLOCATION = Allocator(allocate=allocate, statistic=SquareSum, check=check, released=True)
