"""NeuronAL: block and row sparsities that keep the sparse model's activations aligned with those of the dense model.

Cunegatti et al., Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training, TMLR 2025, Algorithm 1.
"""

import logging
from collections.abc import Sequence
from functools import partial

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.lambda_search import block_rates, search_lambdas, search_rows
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Step, Terms

_NARROWED_FROM, _WIDEST = 0.8, 0.25  # from this target on, the released code drops its widest block lambda
_ROW_STEP = "neuronal"

logger = logging.getLogger(__name__)


def allocate(
    problem: Problem,
    *,
    steps: str = "both",
    schedule: str = "linear",
    lambda_search: str = "set",
    block_lambdas: Sequence[float] = LAMBDAS,
    row_lambdas: Sequence[float] = ROW_LAMBDAS,
) -> Allocation:
    """Run the block step, the row step, or both: each selects the first lambda of least misalignment.

    Where rows cannot differ, or another row step follows, "both" is the block step alone. See `block_schedule` and
    `search_lambdas` for `schedule` and `lambda_search`; the released code has the first choice of either only.
    """
    check(problem, steps=steps, schedule=schedule, lambda_search=lambda_search, block_lambdas=block_lambdas)
    steps = _own_steps(problem, steps)
    rates = uniform_rates(problem.layout, lambda _: problem.target)
    plan = problem.plan(rates, rows_adapted=False)
    baselines = {"uniform": plan}
    records: list[Step] = []
    winner: Trial | None = None
    if steps in ("both", "block"):
        candidate = partial(block_rates, problem, schedule=schedule)
        lambdas = _tried_lambdas(problem, block_lambdas)
        blocks = search_lambdas(problem, "block", lambdas, candidate, rows_adapted=False, search=lambda_search)
        records.append(blocks.step)
        rates, plan, winner = blocks.rates, blocks.plan, blocks.trial
        baselines["block"] = plan
    if steps in ("both", "row"):
        if winner is None:
            (winner,) = problem.probe.tries("uniform", [1.0], [plan])
        rows = search_rows(problem, rates, plan, winner, row_lambdas, search=lambda_search)
        records.append(rows.step)
        rates, plan = rows.rates, rows.plan
    return Allocation(plan=plan, rates=rates, steps=tuple(records), baselines=baselines)


def check(
    terms: Terms,
    *,
    steps: str = "both",
    schedule: str = "linear",
    lambda_search: str = "set",
    block_lambdas: Sequence[float] = LAMBDAS,
) -> None:
    """Raise BadInput for what the released code lacks in `authors` mode, and for row steps that cannot be."""
    for flag, value, only in (("schedule", schedule, "linear"), ("lambda-search", lambda_search, "set")):
        if terms.mode == "authors" and value != only:
            raise BadInput(f"--{flag}: {value} is not in the released code; use --mode paper")
    if not _tried_lambdas(terms, block_lambdas):
        raise BadInput(f"--block-lambdas: the released code leaves {_WIDEST} out from {_NARROWED_FROM} on")
    if steps == "row" and terms.rows_fixed_by:
        raise BadInput(f"--neuronal-steps row: {terms.rows_fixed_by}; use --neuronal-steps block")
    if steps == "block" and terms.row_step is not None:
        raise BadInput("--row-step: there is no row step with --neuronal-steps block; use both")
    if steps == "row" and terms.row_step not in (None, _ROW_STEP):
        raise BadInput(
            f"--neuronal-steps: row asks for NeuronAL's own; use --allocation uniform --row-step {terms.row_step}"
        )
    if steps == "both" and terms.rows_fixed_by:
        logger.info("NeuronAL's block step only: %s", terms.rows_fixed_by)


def candidates(
    terms: Terms,
    *,
    steps: str = "both",
    block_lambdas: Sequence[float] = LAMBDAS,
    row_lambdas: Sequence[float] = ROW_LAMBDAS,
) -> dict[str, int]:
    """Return the number of candidates of each step that will run."""
    counts = {"block": len(_tried_lambdas(terms, block_lambdas)), "row": len(row_lambdas)}
    return {name: count for name, count in counts.items() if _own_steps(terms, steps) in ("both", name)}


def _own_steps(terms: Terms, steps: str) -> str:
    """Return the steps that run here: no row step where rows cannot differ or another row step follows."""
    rows = terms.rows_may_differ and terms.row_step in (None, _ROW_STEP)
    return steps if rows or steps != "both" else "block"


def _tried_lambdas(terms: Terms, lambdas: Sequence[float]) -> Sequence[float]:
    """Return `lambdas` without what the released code leaves out at high targets, in `authors` mode."""
    if terms.mode == "authors" and terms.target >= _NARROWED_FROM:
        return [lam for lam in lambdas if lam != _WIDEST]
    return lambdas


ALLOCATION = Allocator(
    allocate=allocate,
    check=check,
    candidates=candidates,
    options={"steps": "neuronal_steps"},
    released=True,
    row_step=_ROW_STEP,
)
