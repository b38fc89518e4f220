"""Uniform: every row loses the same share of its weights."""

from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem
from neuronal_ray.core.stats import Statistic

STATISTIC: type[Statistic] | None = None


def allocate(problem: Problem) -> Allocation:
    """The target rate everywhere (Wanda, ICLR 2024: each output row is a comparison group)."""
    rates = uniform_rates(problem.layout, lambda _: problem.target)
    return Allocation(plan=problem.plan(rates, rows_adapted=False), rates=rates)
