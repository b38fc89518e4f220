"""AlphaPruning: blocks whose weights have heavier-tailed spectra keep more of their weights."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import LinearData
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Terms
from neuronal_ray.core.spectrum import BOUNDS, eigenvalues, tail_exponent


def allocate(problem: Problem, *, epsilon: float = 0.3, bound: str = "strict") -> Allocation:
    """Return block rates proportional to a linear map of the blocks' exponents to [1 - epsilon, 1 + epsilon].

    Lu et al., AlphaPruning, NeurIPS 2024: a block's metric is the mean exponent of its linears; a block with a higher
    exponent is sparser. A block without an exponent (see tail_exponent) counts as the mean of the others. `bound` is
    "strict" or "compat", the lower bound of the authors' code.
    The authors' code has no upper bound: at high targets a block may lose all weights.
    Differs: rates above 1 are left to the exact budget, which bounds them; equal metrics give the target everywhere
    instead of 0 / 0.
    """
    check(problem, epsilon=epsilon, bound=bound)
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


def check(terms: Terms, *, epsilon: float = 0.3, bound: str = "strict") -> None:
    """Raise BadInput for settings out of range."""
    if not 0 <= epsilon <= 1:
        raise BadInput(f"--set allocation.epsilon: {epsilon}, expected a number from 0 to 1")
    if bound not in BOUNDS:
        raise BadInput(f"--set allocation.bound: {bound!r}, expected one of: {', '.join(BOUNDS)}")


def block_exponents(linears: Sequence[LinearData], *, bound: str) -> list[float]:
    """Return the exponents of the linears that have one; NaN for a linear with weights that are not finite."""
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
    """Return the rates of blocks of `sizes` weights whose mean over the weights is `target`, before any bound."""
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


ALLOCATION = Allocator(allocate=allocate, check=check)
