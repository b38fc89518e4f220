"""NeuronAL: the sparsity of blocks, then of rows, that keeps the sparse model's activations aligned with the dense.

Cunegatti et al., Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training, TMLR 2025, Algorithm 1.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.allocations import Allocation, Problem, Step
from neuronal_ray.config import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import LinearSpec
from neuronal_ray.core.plan import Plan, Rates, uniform_rates
from neuronal_ray.core.spread import linear_schedule, spread

_LOWEST, _HIGHEST = 0.01, 0.99
_NARROWED_FROM, _WIDEST = 0.8, 0.25  # from this target on, the released code drops its widest block lambda


def allocate(
    problem: Problem,
    *,
    steps: str = "both",
    block_lambdas: Sequence[float] = LAMBDAS,
    row_lambdas: Sequence[float] = ROW_LAMBDAS,
) -> Allocation:
    """The block step, the row step, or both: each picks the lambda of least misalignment, first of equals."""
    uniform = uniform_rates(problem.layout, lambda _: problem.target)
    rates, baselines = uniform, {"uniform": problem.plan(uniform, rows_adapted=False)}
    found: list[Step] = []
    winner: Trial | None = None
    if steps in ("both", "block"):
        if problem.mode == "authors" and problem.target >= _NARROWED_FROM:
            block_lambdas = [lam for lam in block_lambdas if lam != _WIDEST]
        candidates = [block_rates(problem, lam) for lam in block_lambdas]
        plans = [problem.plan(candidate, rows_adapted=False) for candidate in candidates]
        step, best, winner = _search(problem, "block", block_lambdas, plans)
        found.append(step)
        rates, plan = candidates[best], plans[best]
        baselines["block"] = plan
    if steps in ("both", "row"):
        if winner is None:
            (winner,) = problem.tries("uniform", [0.0], [baselines["uniform"]])
        if not all(bool(signal.isfinite().all()) for signal in winner.signals.values()):
            raise ValueError("--model: NaN or infinite activations in the pruned model, rows cannot be compared")
        plans = [problem.plan(row_rates(problem, rates, winner, lam), rows_adapted=True) for lam in row_lambdas]
        step, best, _ = _search(problem, "row", row_lambdas, plans)
        found.append(step)
        plan = plans[best]
    return Allocation(plan=plan, steps=tuple(found), baselines=baselines)


def _search(problem: Problem, name: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> tuple[Step, int, Trial]:
    trials = problem.tries(name, lambdas, plans)
    best = min(range(len(trials)), key=lambda index: trials[index].misalignment)  # min keeps the first of equals
    step = Step(
        name=name,
        lambdas=tuple(lambdas),
        misalignments=tuple(trial.misalignment for trial in trials),
        selected=lambdas[best],
    )
    return step, best, trials[best]


def block_rates(problem: Problem, lam: float) -> Rates:
    """Rates rising linearly over the blocks from target - lam to target + lam (section 4.1).

    `authors`: a rate of 0 or less becomes 0.01, of 1 or more 0.99; others are not clipped.
    """
    schedule = linear_schedule(problem.layout.num_blocks, lam=lam, mean=problem.target)
    if problem.mode == "authors":
        schedule = torch.where(schedule <= 0, _LOWEST, torch.where(schedule >= 1, _HIGHEST, schedule))
    by_block = schedule.tolist()
    return uniform_rates(problem.layout, lambda block: by_block[block])


def row_rates(problem: Problem, rates: Rates, winner: Trial, lam: float) -> Rates:
    """Rates of width 2 * lam over the rows of each linear, around the linear's rate (section 4.2).

    A row is denser the more its consumer's input has shrunk: the signed difference of dense and sparse norms, as in
    the released code ("inversely proportional to the alignment" in the paper).
    """
    return {spec.linear: _rates_of_rows(problem, spec, rates[spec.linear], winner, lam) for spec in problem.layout}


def _rates_of_rows(
    problem: Problem, spec: LinearSpec, rates: Float64[Tensor, " rows"], winner: Trial, lam: float
) -> Float64[Tensor, " rows"]:
    if spec.consumer is None or (problem.mode == "authors" and not _adapted_by_authors(problem, spec)):
        return rates
    shrunk = spec.row_levels(winner.signals[spec.consumer].double())
    moved = 1 - spread(shrunk, lam=lam, mean=1 - float(rates[0]))
    return moved.clamp(_LOWEST, _HIGHEST) if problem.mode == "authors" else moved


def _adapted_by_authors(problem: Problem, spec: LinearSpec) -> bool:
    """The released code leaves alone the last block and, with grouped queries, all that the attention reads."""
    if spec.linear.block == problem.layout.num_blocks - 1:
        return False
    siblings = [other for other in problem.layout.groups[spec.reads] if other.consumer == spec.consumer]
    return all(other.sources is None for other in siblings)
