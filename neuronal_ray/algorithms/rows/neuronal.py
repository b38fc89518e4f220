"""NeuronAL's row step, after any allocation.

Cunegatti et al., Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training, TMLR 2025, section 4.2.
"""

from collections.abc import Sequence

from neuronal_ray.algorithms.declarations import RowStep
from neuronal_ray.core.lambda_search import search_rows
from neuronal_ray.core.lambdas import ROW_LAMBDAS
from neuronal_ray.core.problem import Allocation, Problem, Terms


def spread_rows(
    problem: Problem, allocation: Allocation, *, row_lambdas: Sequence[float] = ROW_LAMBDAS, lambda_search: str = "set"
) -> Allocation:
    """Spread the rows by the lambda of least score; the allocation's own plan is tried first (see `search_rows`)."""
    found = search_rows(problem, allocation.rates, allocation.plan, None, row_lambdas, search=lambda_search)
    return allocation.with_rows(found.rates, found.plan, steps=(found.step,))


def candidates(terms: Terms, *, row_lambdas: Sequence[float] = ROW_LAMBDAS) -> dict[str, int]:
    """Return the number of candidates."""
    return {"row": len(row_lambdas)}


ROW_STEP = RowStep(spread_rows=spread_rows, candidates=candidates)
