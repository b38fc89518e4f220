"""Uniform: every row loses the same share of its weights."""

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem


def allocate(problem: Problem) -> Allocation:
    """Return the target rate everywhere (Wanda, ICLR 2024: each output row is a comparison group)."""
    rates = uniform_rates(problem.layout, lambda _: problem.target)
    return Allocation(plan=problem.plan(rates, rows_adapted=False), rates=rates)


ALLOCATION = Allocator(allocate=allocate, released=True, spreads=False)
