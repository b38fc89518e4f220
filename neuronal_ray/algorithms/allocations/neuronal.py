"""NeuronAL: the sparsity of blocks, then of rows, that keeps the sparse model's activations aligned with the dense.

Cunegatti et al., Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training, TMLR 2025, Algorithm 1.
"""

from collections.abc import Sequence
from functools import partial

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.lambda_search import block_rates, search_lambdas, search_rows
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Step
from neuronal_ray.core.stats import Statistic

STATISTIC: type[Statistic] | None = None

_NARROWED_FROM, _WIDEST = 0.8, 0.25  # from this target on, the released code drops its widest block lambda


def allocate(
    problem: Problem,
    *,
    steps: str = "both",
    schedule: str = "linear",
    lambda_search: str = "set",
    block_lambdas: Sequence[float] = LAMBDAS,
    row_lambdas: Sequence[float] = ROW_LAMBDAS,
) -> Allocation:
    """The block step, the row step, or both: each picks the lambda of least misalignment, first of equals.

    Under a pattern "both" is the block step alone. See `block_schedule` and `search_lambdas` for `schedule` and
    `lambda_search`; the released code has the first choice of either only.
    """
    for flag, value, only in (("schedule", schedule, "linear"), ("lambda-search", lambda_search, "set")):
        if problem.mode == "authors" and value != only:
            raise BadInput(f"--{flag}: {value} is not in the released code; use --mode paper")
    if steps == "both" and problem.pattern is not None:
        steps = "block"
    rates = uniform_rates(problem.layout, lambda _: problem.target)
    plan = problem.plan(rates, rows_adapted=False)
    baselines = {"uniform": plan}
    found: list[Step] = []
    winner: Trial | None = None
    if steps in ("both", "block"):
        if problem.mode == "authors" and problem.target >= _NARROWED_FROM:
            block_lambdas = [lam for lam in block_lambdas if lam != _WIDEST]
            if not block_lambdas:
                raise BadInput(f"--block-lambdas: the released code leaves {_WIDEST} out from {_NARROWED_FROM} on")
        candidate = partial(block_rates, problem, schedule=schedule)
        blocks = search_lambdas(problem, "block", block_lambdas, candidate, rows_adapted=False, search=lambda_search)
        found.append(blocks.step)
        rates, plan, winner = blocks.rates, blocks.plan, blocks.trial
        baselines["block"] = plan
    if steps in ("both", "row"):
        if winner is None:
            (winner,) = problem.probe.tries("uniform", [0.0], [plan])
        rows = search_rows(problem, rates, plan, winner, row_lambdas, search=lambda_search)
        found.append(rows.step)
        rates, plan = rows.rates, rows.plan
    return Allocation(plan=plan, rates=rates, steps=tuple(found), baselines=baselines)
