"""AlphaPruning: the blocks whose weights have the heavier-tailed spectra keep more of them."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Weighed
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem
from neuronal_ray.core.spectrum import BOUNDS, eigenvalues, tail_exponent
from neuronal_ray.core.stats import Statistic

STATISTIC: type[Statistic] | None = None


def allocate(problem: Problem, *, epsilon: float = 0.3, bound: str = "strict") -> Allocation:
    """Block rates proportional to a linear map of the blocks' exponents to [1 - epsilon, 1 + epsilon].

    Lu et al., AlphaPruning, NeurIPS 2024: a block's metric is the mean exponent of its linears; the higher,
    the sparser. A block without an exponent (see tail_exponent) counts as the mean of the others. `bound` is "strict"
    or "compat", the lower bound of the authors' code. BadInput in `authors` mode: NeuronAL's released code cannot run
    it.
    Differs: rates above 1 are left to the exact budget, which bounds them; equal metrics give the target everywhere
    instead of 0 / 0.
    """
    if problem.mode == "authors":
        raise BadInput("--allocation alphapruning: not in the released code; use --mode paper")
    if not 0 <= epsilon <= 1:
        raise BadInput(f"--set allocation.epsilon: {epsilon}, expected a number from 0 to 1")
    if bound not in BOUNDS:
        raise BadInput(f"--set allocation.bound: {bound!r}, expected one of: {', '.join(BOUNDS)}")
    exponents = problem.probe.measure(partial(block_exponents, bound=bound))
    for block, found in enumerate(exponents):
        if not all(math.isfinite(exponent) for exponent in found):
            raise BadInput(f"--model: NaN or infinite weights in block {block}")
    sizes = torch.tensor(
        [sum(spec.size for spec in specs) for specs in problem.layout.blocks], dtype=torch.float64
    )  # [blocks]
    by_block = block_rates(exponents, sizes, epsilon=epsilon, target=problem.target).tolist()
    rates = uniform_rates(problem.layout, lambda block: by_block[block])
    return Allocation(plan=problem.plan(rates, rows_adapted=False), rates=rates)


def block_exponents(linears: Sequence[Weighed], *, bound: str) -> list[float]:
    """The exponents of the linears that have one; NaN for a weight that is not finite."""
    found = []
    for linear in linears:
        finite = bool(linear.weight.isfinite().all())
        exponent = tail_exponent(eigenvalues(linear.weight), bound=bound) if finite else math.nan
        if exponent is not None:
            found.append(exponent)
    return found


def block_rates(
    exponents: Sequence[Sequence[float]], sizes: Float64[Tensor, " blocks"], *, epsilon: float, target: float
) -> Float64[Tensor, " blocks"]:
    """Rates of blocks of `sizes` weights whose mean over weights is `target`, before any bound."""
    means = [sum(found) / len(found) for found in exponents if found]
    if not means:
        return torch.full_like(sizes, target)
    neutral = sum(means) / len(means)
    metrics = torch.tensor(
        [sum(found) / len(found) if found else neutral for found in exponents], dtype=torch.float64
    )  # [blocks]
    low, high = metrics.min(), metrics.max()
    if low == high:
        return torch.full_like(sizes, target)
    levels = (metrics - low) / (high - low) * (2 * epsilon) + (1 - epsilon)
    return levels * (target * sizes.sum() / (sizes * levels).sum())
