"""NeuronAL's search over lambdas: the candidates of the block step, and of the row step after any allocation.

Cunegatti et al., Zeroth-Order Adaptive Neuron Alignment Based Pruning without Re-Training, TMLR 2025, section 4.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import LinearSpec
from neuronal_ray.core.plan import Plan, Rates, uniform_rates
from neuronal_ray.core.problem import Problem, Step
from neuronal_ray.core.spread import block_schedule, spread

SEARCHES = ("set", "continuous")

_LOWEST, _HIGHEST = 0.01, 0.99
_COARSE, _PER_ROUND = 5, 4  # no matter how many workers there are: results do not depend on them
_LAMBDA_DECIMALS = 6


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """The candidate that a search selected: its rates, plan and trial, and the record of the search."""

    rates: Rates
    plan: Plan
    trial: Trial
    step: Step


def search_rows(
    problem: Problem, rates: Rates, plan: Plan, winner: Trial | None, lambdas: Sequence[float], *, search: str = "set"
) -> Found:
    """Run the row step after `rates` and their `plan`: select the rows' lambda (see `search_lambdas`).

    `winner` is the plan's trial; if it is None, the plan is tried first and recorded as step "before rows". Raises
    BadInput if the trial overflowed, and under a pattern, which has one count for all rows of a linear.
    """
    if problem.pattern is not None:
        raise BadInput("--pattern: leaves no choice between the rows of a linear, expected no row step")
    if winner is None:
        (winner,) = problem.probe.tries("before rows", [1.0], [plan])
    if not all(bool(signal.isfinite().all()) for signal in winner.signals.values()):
        raise BadInput("--model: NaN or infinite activations in the pruned model, rows cannot be compared")
    candidate = partial(row_rates, problem, rates, winner)
    return search_lambdas(problem, "row", lambdas, candidate, rows_adapted=True, search=search)


def block_rates(problem: Problem, lam: float, *, schedule: str = "linear") -> Rates:
    """Return rates that rise over the blocks around the target, linearly from target - lam to target + lam (4.1).

    `authors`: a rate of 0 or less becomes 0.01, of 1 or more 0.99; others are not clipped.
    """
    by_index = block_schedule(schedule, problem.layout.num_blocks, lam=lam, mean=problem.target)
    if problem.mode == "authors":
        by_index = torch.where(by_index <= 0, _LOWEST, torch.where(by_index >= 1, _HIGHEST, by_index))
    by_block = by_index.tolist()
    return uniform_rates(problem.layout, lambda block: by_block[block])


def row_rates(problem: Problem, rates: Rates, winner: Trial, lam: float) -> Rates:
    """Return rates spread by 2 * lam over the rows of each linear, around the linear's mean (section 4.2).

    A row is denser the more its consumer's input has shrunk: the signed difference of dense and sparse norms, as in
    the released code ("inversely proportional to the alignment" in the paper).
    """
    computed: dict[object, Float64[Tensor, " rows"]] = {}  # linears that feed one input alike share their rates
    moved = {}
    for spec in problem.layout:
        given = rates[spec.linear]
        key = spec.linear if spec.sources is not None else (spec.reads, spec.consumer, id(given))
        if key not in computed:
            computed[key] = _rates_of_rows(problem, spec, given, winner, lam)
        moved[spec.linear] = computed[key]
    return moved


def _rates_of_rows(
    problem: Problem, spec: LinearSpec, rates: Float64[Tensor, " rows"], winner: Trial, lam: float
) -> Float64[Tensor, " rows"]:
    if spec.consumer is None or (problem.mode == "authors" and not _adapted_by_authors(problem, spec)):
        return rates
    shrunk = spec.row_signal(winner.signals[spec.consumer].double())
    moved = 1 - spread(shrunk, lam=lam, mean=1 - float(rates[0])) + (rates - rates[0])  # exactly 0 for equal rates
    return moved.clamp(_LOWEST, _HIGHEST) if problem.mode == "authors" else moved


def _adapted_by_authors(problem: Problem, spec: LinearSpec) -> bool:
    """Return False for linears whose rows the released code does not adapt.

    These are the last block's and, with grouped queries, all that share the input of the attention.
    """
    if spec.linear.block == problem.layout.num_blocks - 1:
        return False
    siblings = [other for other in problem.layout.groups[spec.reads] if other.consumer == spec.consumer]
    return all(other.sources is None for other in siblings)


def search_lambdas(
    problem: Problem,
    name: str,
    lambdas: Sequence[float],
    rates_of: Callable[[float], Rates],
    *,
    rows_adapted: bool,
    search: str,
) -> Found:
    """Return the candidate of least score by the problem's criterion, the first one tried among equals.

    `set` tries all of `lambdas`. `continuous` searches [0, max(lambdas)] with no more trials than `lambdas` has
    members: some of the members first, then rounds of points next to the best lambda so far. A candidate that
    overflowed is selected only if all did. The step records lambdas in the order in which they were tried. Raises
    BadInput for another `search`.
    """
    if search not in SEARCHES:
        raise BadInput(f"--lambda-search: unknown name {search!r}, expected one of: {', '.join(SEARCHES)}")

    def candidate_of(lam: float) -> tuple[Rates, Plan]:
        rates = rates_of(lam)
        plan = problem.plan(rates, rows_adapted=rows_adapted)
        plan.digest  # noqa: B018  # computes it in this thread; the plan caches it
        return rates, plan

    tried: list[float] = []
    candidates: list[Future[tuple[Rates, Plan]]] = []
    trials: list[Trial] = []
    best, batch = 0, list(lambdas) if search == "set" else _coarse(lambdas)
    with ThreadPoolExecutor(1) as thread:  # builds plans while earlier ones are evaluated
        while batch:
            tried += batch
            pending = [thread.submit(candidate_of, lam) for lam in batch]
            candidates += pending
            trials += problem.probe.tries(name, batch, _PendingPlans(pending))
            best = min(
                range(len(trials)), key=lambda index: trials[index].score(problem.criterion)
            )  # min keeps the first of equals
            batch = _next_round(tried, tried[best], upper=max(lambdas), left=len(lambdas) - len(tried))
    rates, plan = candidates[best].result()
    step = Step(
        name=name,
        lambdas=tuple(tried),
        scores=tuple(trial.score(problem.criterion) for trial in trials),
        selected=tried[best],
    )
    return Found(rates=rates, plan=plan, trial=trials[best], step=step)


class _PendingPlans(Sequence[Plan]):
    """Plans that another thread builds while earlier ones are evaluated."""

    def __init__(self, candidates: Sequence[Future[tuple[Rates, Plan]]]) -> None:
        self._candidates = candidates

    def __len__(self) -> int:
        return len(self._candidates)

    def __getitem__(self, index: int) -> Plan:  # type: ignore[override]  # one at a time
        return self._candidates[index].result()[1]


def _coarse(lambdas: Sequence[float]) -> list[float]:
    """Return members of the set, evenly spaced in their order, among them the least and the largest."""
    ordered = sorted(set(lambdas))
    if len(ordered) <= _COARSE:
        return ordered
    return [ordered[round(index * (len(ordered) - 1) / (_COARSE - 1))] for index in range(_COARSE)]


def _next_round(tried: Sequence[float], best: float, *, upper: float, left: int) -> list[float]:
    """Return up to `left` points that divide the gaps on both sides of `best` evenly; the wider gap gets an odd one.

    The gaps end at the next lambda tried, or at the bounds 0 and `upper`. Of gaps of one width the lower gets the odd
    point.
    """
    known = sorted({0.0, upper, *tried})
    gaps = [(low, high) for low, high in pairwise(known) if best in (low, high)]
    gaps.sort(key=lambda gap: round(gap[0] - gap[1], _LAMBDA_DECIMALS))  # widest first
    points = []
    count = min(_PER_ROUND, left)
    for index, (low, high) in enumerate(gaps):
        share = (count + len(gaps) - 1 - index) // len(gaps)
        points += [round(low + (high - low) * (part + 1) / (share + 1), _LAMBDA_DECIMALS) for part in range(share)]
    return sorted(set(points) - set(known))
