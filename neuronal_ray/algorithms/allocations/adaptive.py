"""Adaptive: sparsities of blocks, sub-blocks and rows that keep next-token distributions closest to the dense model's.

A zeroth-order search like NeuronAL's (Cunegatti et al., TMLR 2025), with the divergence from the dense model's outputs
in place of the alignment of activation norms, and with more directions.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.budgeted_search import BudgetedSearch
from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.algorithms.probed_directions import (
    NUM_CANDIDATES,
    affordable_cells,
    lines,
    means_of_plan,
    plan_of_means,
)
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.lambda_search import block_rates, row_rates
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.layout import Linear, LinearData
from neuronal_ray.core.masks import smallest
from neuronal_ray.core.plan import Plan, Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Terms
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum

_NAME = "adaptive"
_NEURONAL = "neuronal"
_STARTS = (_NEURONAL, "owl", "dlp", "alphapruning")

# Chosen by hand on five of the small models of docs/results/quality.md.
_DROPS = 2
_LEAST_SHARE = 18  # evaluations below which an iteration is not worth its cost
_NEURONAL_SHARE = 1 / 3  # of the budget at most
_WORTH_ITS_BIAS = 0.75  # the search moves on from a start whose divergence is below this share of uniform's
_ROW_LAMBDAS, _ROW_SHARES = (0.05, 0.1, 0.15, 0.2), (0.4, 0.6, 0.8, 1.0)
_DIFFERENCES_COST = 2  # a pass of the dense and a pass of the sparse model
_ROWS_COST = _DIFFERENCES_COST + len(_ROW_LAMBDAS) + len(_ROW_SHARES)

logger = logging.getLogger(__name__)


def allocate(
    problem: Problem,
    *,
    budget: int = 140,
    blocks: bool = True,
    parts: bool = True,
    rows: bool = True,
    starts: str = "neuronal,owl,dlp",
    iterations: int = 4,
    halves: bool = True,
    block_lambdas: Sequence[float] = LAMBDAS,
    row_lambdas: Sequence[float] = ROW_LAMBDAS,
) -> Allocation:
    """Search for the rates of least KL divergence from the dense model on the search text, within `budget` evaluations.

    1. Uniform rates, NeuronAL's block and row candidates and the allocations named in `starts` are candidates. The
       search moves on from uniform, or from the best candidate if its divergence is a quarter lower.
    2. `iterations` times, once more where rows cannot differ: probe every cell (linears of a kind in neighboring
       blocks), every coarse direction and, at first, every sub-block without its weights, all on a quarter of the
       text; then compare steps of several lengths on all of it (core/directions.py).
    3. Compare spreads over the rows of each linear: by the difference of their outputs, and by the energy they lose.

    A candidate is selected only if it is better on both `halves` of the sequences (without `halves`: in the mean); so
    no plan that was tried is better on both. The uniform plan is tried first, and NeuronAL's candidates where they take
    no more than a third of the budget; its winners, by alignment as published, are baselines. An evaluation is one pass
    of the whole search text; a probe counts by its tokens and blocks.
    """
    check(problem, budget=budget, starts=starts, iterations=iterations)
    rows = rows and problem.rows_may_differ and problem.row_step is None
    search = BudgetedSearch(problem, budget, name=_NAME, halves=halves)
    baselines = _start(search, _names(starts), block_lambdas, row_lambdas if rows else ())
    assert search.best is not None
    if search.best.score > 0:
        if blocks or parts:
            reserved = min(_ROWS_COST, budget // 3) if rows else 0
            _move(search, iterations if rows else iterations + 1, reserved, blocks=blocks, parts=parts)
        if rows and search.left > _DIFFERENCES_COST:
            _spread_rows(search)
    plan = search.best.plan
    return Allocation(plan=plan, rates=_rates(problem, plan), steps=(search.step(),), baselines=baselines)


def check(terms: Terms, *, budget: int = 140, starts: str = "neuronal,owl,dlp", iterations: int = 4) -> None:
    """Raise BadInput for settings out of range, and for a criterion other than kl."""
    if terms.criterion != "kl":
        raise BadInput("--allocation adaptive: compares by --criterion kl only; for alignment use neuronal")
    if budget < 1:
        raise BadInput(f"--search-budget: {budget} is not positive")
    if iterations < 0:
        raise BadInput(f"--set allocation.iterations: {iterations}, expected 0 or more")
    for name in _names(starts):
        if name not in _STARTS:
            raise BadInput(f"--set allocation.starts: {name!r}, expected some of: {', '.join(_STARTS)}")


def candidates(terms: Terms, *, budget: int = 140) -> dict[str, int]:
    """Return the budget: probes of changes count by their tokens and blocks."""
    return {_NAME: budget}


def _names(starts: str) -> list[str]:
    return [name.strip() for name in starts.split(",") if name.strip()]


def _start(
    search: BudgetedSearch, names: Sequence[str], block_lambdas: Sequence[float], row_lambdas: Sequence[float]
) -> dict[str, Plan]:
    """Run step 1 of `allocate`; return the plans to compare with, NeuronAL's winners by its criterion among them."""
    problem = search.problem
    uniform = problem.plan(uniform_rates(problem.layout, lambda _: problem.target), rows_adapted=False)
    plans = [uniform]
    plans += [registry.load("allocations", name).allocate(problem).plan for name in names if name != _NEURONAL]
    affordable = search.left * _NEURONAL_SHARE  # at small budgets other candidates are worth more
    lambdas = block_lambdas if _NEURONAL in names and len(block_lambdas) <= affordable else ()
    row_lambdas = row_lambdas if len(lambdas) + len(row_lambdas) <= affordable else ()
    by_lambda = [block_rates(problem, lam) for lam in lambdas]
    trials = search.tries(plans + [problem.plan(rates, rows_adapted=False) for rates in by_lambda])
    baselines = {"uniform": uniform}
    winner = _least_misaligned(trials[len(plans) :])
    if winner is not None:
        rates, trial = by_lambda[winner], trials[len(plans) + winner]
        baselines["block"] = problem.plan(rates, rows_adapted=False)
        spreads = [problem.plan(row_rates(problem, rates, trial, lam), rows_adapted=True) for lam in row_lambdas]
        winner = _least_misaligned(search.tries(spreads))
        if winner is not None:
            baselines[_NEURONAL] = spreads[winner]
    return baselines


def _least_misaligned(trials: Sequence[Trial]) -> int | None:
    """Return the index of NeuronAL's choice, the first of equals; None if no misalignment is finite."""
    finite = [index for index, trial in enumerate(trials) if math.isfinite(trial.misalignment)]
    return min(finite, key=lambda index: trials[index].misalignment, default=None)


def _move(search: BudgetedSearch, iterations: int, reserved: int, *, blocks: bool, parts: bool) -> None:
    """Run step 2 of `allocate`: rounds of probes, then of candidates along the directions that the probes suggest."""
    problem = search.problem
    assert search.first is not None
    assert search.best is not None
    here = search.best if search.best.score < _WORTH_ITS_BIAS * search.first.score else search.first
    fine = coarse = 1.0  # factors of the lengths, smaller once these prove too long
    momentum: Float64[Tensor, " linears"] | None = None
    iterations = min(iterations, max(1, int((search.left - reserved) / _LEAST_SHARE)))
    for iteration in range(iterations):
        share = (search.left - reserved) / (iterations - iteration)
        part, cells = affordable_cells(problem, iteration, share - NUM_CANDIDATES, blocks=blocks, parts=parts)
        if cells is None:
            break
        rates = means_of_plan(problem, here.plan)
        suggested, cost = lines(
            problem,
            here.plan,
            rates,
            cells,
            part,
            momentum,
            fine=fine,
            coarse=coarse,
            drops=iteration < _DROPS,
            left=search.left,
        )
        search.left -= cost
        steps = [(line, length) for line in suggested for length in line.lengths]
        plans = [plan_of_means(problem, rates + length * line.direction) for line, length in steps]
        selected = search.compare(plans, here)
        momentum = None
        if selected is None:
            fine, coarse = 0.4 * fine, 0.4 * coarse
            continue
        index, here = selected
        logger.info("iteration %d: divergence %.4g", iteration + 1, here.score)
        line, length = steps[index]
        shortest, longest = length == line.lengths[0], length == line.lengths[-1]
        if line.fine:
            momentum = (means_of_plan(problem, here.plan) - rates) / length / fine
            fine *= 0.4 if shortest else 1.6 if longest else 0.8
        else:
            fine *= 0.8
            coarse *= 0.5 if shortest else 1.0


def _spread_rows(search: BudgetedSearch) -> None:
    """Run step 3 of `allocate`."""
    problem = search.problem
    assert search.best is not None
    plan = search.best.plan
    rates = _rates(problem, plan)
    differences = problem.probe.differences(plan)
    search.left -= _DIFFERENCES_COST
    removed = {linear: int(counts.sum()) for linear, counts in plan.removed.items()}
    joint: dict[Linear, Tensor] = {}
    for block in problem.probe.measure(partial(joint_rates, removed=removed)):
        joint |= block
    spreads = [_by_difference(rates, differences, lam) for lam in _ROW_LAMBDAS]
    spreads += [{name: rate + share * (joint[name] - rate) for name, rate in rates.items()} for share in _ROW_SHARES]
    search.compare([problem.plan(spread_rates, rows_adapted=True) for spread_rates in spreads], search.best)


def _rates(problem: Problem, plan: Plan) -> Rates:
    """Return the rates of the rows under `plan`."""
    return {spec.linear: plan.removed[spec.linear].double() / spec.columns for spec in problem.layout}


def _by_difference(rates: Rates, differences: Mapping[Linear, Float64[Tensor, " rows"]], lam: float) -> Rates:
    """Return rates spread by 2 * lam over each linear's rows; the larger a row's output difference, the denser."""
    moved = dict(rates)
    for linear, difference in differences.items():
        moved[linear] = 1 - spread(difference, lam=lam, mean=1 - float(rates[linear].mean()))
    return moved


def joint_rates(
    linears: Sequence[LinearData], *, removed: Mapping[Linear, int]
) -> dict[Linear, Float64[Tensor, " rows"]]:
    """Return the rates of the rows if the `removed` weights of least |W_ij| * a_j of each whole linear went."""
    rates = {}
    for linear in linears:
        assert linear.inputs is not None, linear.spec.linear
        count = removed[linear.spec.linear]
        if count in (0, linear.spec.size):
            rates[linear.spec.linear] = torch.full((linear.spec.rows,), count / linear.spec.size, dtype=torch.float64)
            continue
        score = linear.weight.float().abs() * linear.inputs.norm
        low = score <= smallest(score, count)
        rates[linear.spec.linear] = low.sum(dim=1).double().cpu() / linear.spec.columns
    return rates


ALLOCATION = Allocator(
    allocate=allocate,
    statistic=SquareSum,
    check=check,
    candidates=candidates,
    options={"budget": "search_budget"},
    criterion="kl",
    combines_levels=True,
)
