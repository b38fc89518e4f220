"""TRIM's row step, after any allocation (Beck et al., arXiv 2505.16743, 2025)."""

from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.algorithms.declarations import RowStep
from neuronal_ray.core.problem import Allocation, Problem, RankedLinear
from neuronal_ray.core.trim_rows import trim_rows


def spread_rows(problem: Problem, allocation: Allocation) -> Allocation:
    """Spread each linear's rows so that its outputs stay closest to the dense ones (see `trim_rows`).

    Differs: the inputs are those of the dense model, not of the model pruned so far.
    """
    rates = dict(allocation.rates) | problem.probe.map_linears(row_rates, allocation.plan)
    return allocation.with_rows(rates, problem.plan(rates, rows_adapted=True))


def row_rates(linear: RankedLinear) -> Float64[Tensor, " rows"]:
    """Return the rates of one linear's rows, on the host."""
    return trim_rows(linear.weight, linear.gram, linear.ranks, linear.removed).cpu()


ROW_STEP = RowStep(spread_rows=spread_rows, reads_calibration=True)
