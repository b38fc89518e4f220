"""Adaptive: the sparsity of blocks, of the parts in them and of rows that keeps next-token distributions closest.

A zeroth-order search like NeuronAL's (Cunegatti et al., TMLR 2025), with the divergence from the dense model's outputs
in place of the alignment of activation norms, and with more directions to go.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.directions import Cells, coarse_direction, fine_direction
from neuronal_ray.core.lambda_search import block_rates, row_rates
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.layout import Linear, Weighed
from neuronal_ray.core.levels import level_counts
from neuronal_ray.core.masks import smallest
from neuronal_ray.core.plan import Counts, Plan, Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Step
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum, Statistic

STATISTIC: type[Statistic] | None = SquareSum

# Chosen by hand on five of the small models of docs/results/quality.md.
_FINE = (0.04, 0.1, 0.25)  # lengths, in units of rate
_COARSE = (0.35, 0.7, 1.2)  # of the way to the parabolas' minima
_BOTH = (0.5, 1.0)
_POOLED = (0.0, 0.5)
_NUM_CANDIDATES = len(_POOLED) * len(_FINE) + len(_COARSE) + len(_BOTH)
_FINE_SHARE = 0.25
_DROPS, _MOST_EMPTIED = 2, 3
_LEAST_SHARE = 18  # evaluations, for an iteration to be worth its while
_NEURONAL_SHARE = 1 / 3  # of the budget at most
_WORTH_ITS_BIAS = 0.75  # a start that diverges as much less than uniform is moved from; else uniform is
_LEAST_SCALE = 0.25
_PROBE = 0.1  # change of a cell's rate whose effect is looked at
_PROBE_LEAST = 0.03
_AXIS_STEP, _AXIS_LARGEST = 0.06, 0.16
_MOMENTUM = 0.3
_STARTS = ("neuronal", "owl", "dlp", "alphapruning")
_ROW_LAMBDAS, _ROW_SHARES = (0.05, 0.1, 0.15, 0.2), (0.4, 0.6, 0.8, 1.0)
_DIFFERENCES_COST = 2  # the dense and the sparse model, side by side
_ROWS_COST = _DIFFERENCES_COST + len(_ROW_LAMBDAS) + len(_ROW_SHARES)

logger = logging.getLogger(__name__)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """A plan with its divergence on each search sequence, and its number in the record."""

    plan: Plan
    divergences: tuple[float, ...]
    number: int

    @property
    def score(self) -> float:
        """The mean over the sequences."""
        return _mean(self.divergences)

    def betters(self, other: "_State", *, halves: bool) -> bool:
        """Whether less on the even sequences and on the odd ones: what helps one half only fits its noise."""
        if not halves:
            return self.score < other.score
        ours, theirs = self.divergences, other.divergences
        parts = [slice(0, None, 2), slice(1, None, 2)] if len(ours) > 1 else [slice(None)]
        return all(_mean(ours[part]) < _mean(theirs[part]) for part in parts)


class _Hunt:
    """Asks for candidates within the budget, and remembers the best."""

    def __init__(self, problem: Problem, budget: int, *, halves: bool = True) -> None:
        self.problem, self.left, self._halves = problem, float(budget), halves
        self.scores: list[float] = []
        self.first: _State | None = None
        self.best: _State | None = None

    def compare(self, plans: Sequence[Plan], base: _State | None) -> tuple[int, _State] | None:
        """The best of as many plans as the budget allows that is better than `base` on both halves, and its index."""
        plans, numbers = self._affordable(plans)
        return self._taken(plans, self.problem.probe.divergences("adaptive", numbers, plans), base) if plans else None

    def tries(self, plans: Sequence[Plan]) -> list[Trial]:
        """`compare` with all that a trial tells of the plans."""
        plans, numbers = self._affordable(plans)
        trials = self.problem.probe.tries("adaptive", numbers, plans) if plans else []
        self._taken(plans, [trial.divergences for trial in trials], self.best)
        return trials

    def _affordable(self, plans: Sequence[Plan]) -> tuple[Sequence[Plan], list[float]]:
        """The first plans, paid for, and their numbers in the record."""
        plans = plans[: max(0, int(self.left))]
        self.left -= len(plans)
        return plans, [float(len(self.scores) + index) for index in range(len(plans))]

    def _taken(
        self, plans: Sequence[Plan], found: Sequence[tuple[float, ...]], base: _State | None
    ) -> tuple[int, _State] | None:
        first = len(self.scores)
        states = [
            _State(plan=plan, divergences=divergences, number=first + index)
            for index, (plan, divergences) in enumerate(zip(plans, found, strict=True))
        ]
        self.scores += [state.score for state in states]
        if self.first is None and states:
            self.first = self.best = states[0]
        ranked = sorted(states, key=lambda state: state.score)
        self.best = next(
            (state for state in ranked if self.best is None or state.betters(self.best, halves=self._halves)), self.best
        )
        taken = next((state for state in ranked if base is None or state.betters(base, halves=self._halves)), None)
        return None if taken is None else (taken.number - first, taken)

    def step(self) -> Step:
        """The record: candidates by the order in which they were tried."""
        assert self.best is not None
        return Step(
            name="adaptive",
            lambdas=tuple(float(number) for number in range(len(self.scores))),
            scores=tuple(self.scores),
            selected=float(self.best.number),
        )


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
    """Rates of least KL divergence from the dense model on the search text, of no more than `budget` evaluations.

    1. Uniform, NeuronAL's block and row candidates and the allocations named in `starts` are candidates. The search
       moves on from uniform, or from the best of them where it diverges by a quarter less.
    2. `iterations` times, once more where rows cannot differ: probe every cell (linears of a kind in neighboring
       blocks), every coarse direction and, at first, every part of a block without its weights, all on a quarter of the
       text; then compare steps of several lengths on all of it (core/directions.py).
    3. Compare spreads over the rows of each linear: by the difference of their outputs, and by the energy they lose.

    A candidate is taken only if it is better on both `halves` of the sequences (else in the mean). The uniform plan and
    NeuronAL's block and row winners (by alignment, as published) are candidates, so none of them diverges less, up to
    that rule. An evaluation is one pass of the whole search text; a probe counts by its tokens and blocks.
    """
    if problem.mode == "authors":
        raise BadInput("--allocation adaptive: not in the released code; use --mode paper")
    if problem.criterion != "kl":
        raise BadInput("--allocation adaptive: compares by --criterion kl only; for alignment use neuronal")
    if budget < 1:
        raise BadInput(f"--search-budget: {budget} is not positive")
    if iterations < 0:
        raise BadInput(f"--set allocation.iterations: {iterations}, expected 0 or more")
    names = _names(starts)
    rows = rows and problem.pattern is None and not problem.levels
    hunt = _Hunt(problem, budget, halves=halves)
    baselines = _start(hunt, names, block_lambdas, row_lambdas if rows else ())
    assert hunt.best is not None
    if hunt.best.score > 0:
        if blocks or parts:
            reserved = min(_ROWS_COST, budget // 3) if rows else 0
            _move(hunt, iterations if rows else iterations + 1, reserved, blocks=blocks, parts=parts)
        if rows and hunt.left > _DIFFERENCES_COST:
            _spread_rows(hunt)
    plan = hunt.best.plan
    return Allocation(plan=plan, rates=_rates(problem, plan), steps=(hunt.step(),), baselines=baselines)


def _names(starts: str) -> list[str]:
    names = [name.strip() for name in starts.split(",") if name.strip()]
    for name in names:
        if name not in _STARTS:
            raise BadInput(f"--set allocation.starts: {name!r}, expected some of: {', '.join(_STARTS)}")
    return names


def _start(
    hunt: _Hunt, names: Sequence[str], block_lambdas: Sequence[float], row_lambdas: Sequence[float]
) -> dict[str, Plan]:
    """Step 1 of `allocate`; the plans to compare with, NeuronAL's winners by its own criterion among them."""
    problem = hunt.problem
    uniform = problem.plan(uniform_rates(problem.layout, lambda _: problem.target), rows_adapted=False)
    plans = [uniform]
    plans += [registry.load("allocations", name).allocate(problem).plan for name in names if name != "neuronal"]
    affordable = hunt.left * _NEURONAL_SHARE  # at small budgets other candidates are worth more
    lambdas = block_lambdas if "neuronal" in names and len(block_lambdas) <= affordable else ()
    row_lambdas = row_lambdas if len(lambdas) + len(row_lambdas) <= affordable else ()
    candidates = [block_rates(problem, lam) for lam in lambdas]
    trials = hunt.tries(plans + [problem.plan(rates, rows_adapted=False) for rates in candidates])
    baselines = {"uniform": uniform}
    winner = _least_misaligned(trials[len(plans) :])
    if winner is not None:
        rates, trial = candidates[winner], trials[len(plans) + winner]
        baselines["block"] = problem.plan(rates, rows_adapted=False)
        spreads = [problem.plan(row_rates(problem, rates, trial, lam), rows_adapted=True) for lam in row_lambdas]
        winner = _least_misaligned(hunt.tries(spreads))
        if winner is not None:
            baselines["neuronal"] = spreads[winner]
    return baselines


def _least_misaligned(trials: Sequence[Trial]) -> int | None:
    """NeuronAL's choice, the first of equals; None without a finite one."""
    finite = [index for index, trial in enumerate(trials) if math.isfinite(trial.misalignment)]
    return min(finite, key=lambda index: trials[index].misalignment, default=None)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Line:
    """Candidates in one direction: moves of the linears' rates, and how far to go."""

    direction: Float64[Tensor, " linears"]
    lengths: tuple[float, ...]
    fine: bool


def _move(hunt: _Hunt, iterations: int, reserved: int, *, blocks: bool, parts: bool) -> None:
    """Step 2 of `allocate`: rounds of probes, then of candidates along the directions that these suggest."""
    problem = hunt.problem
    assert hunt.first is not None
    assert hunt.best is not None
    here = hunt.best if hunt.best.score < _WORTH_ITS_BIAS * hunt.first.score else hunt.first
    fine = coarse = 1.0  # what the lengths are multiplied by, smaller when they prove too long
    momentum: Float64[Tensor, " linears"] | None = None
    iterations = min(iterations, max(1, int((hunt.left - reserved) / _LEAST_SHARE)))
    for iteration in range(iterations):
        share = (hunt.left - reserved) / (iterations - iteration)
        part, cells = _excerpt(problem, iteration, share - _NUM_CANDIDATES, blocks=blocks, parts=parts)
        if cells is None:
            break
        rates = _means(problem, here.plan)
        lines, cost = _lines(
            problem,
            here.plan,
            rates,
            cells,
            part,
            momentum,
            fine=fine,
            coarse=coarse,
            drops=iteration < _DROPS,
            left=hunt.left,
        )
        hunt.left -= cost
        steps = [(line, length) for line in lines for length in line.lengths]
        taken = hunt.compare([_plan(problem, rates + length * line.direction) for line, length in steps], here)
        momentum = None
        if taken is None:
            fine, coarse = 0.4 * fine, 0.4 * coarse
            continue
        chosen, here = taken
        logger.info("iteration %d: divergence %.4g", iteration + 1, here.score)
        line, length = steps[chosen]
        shortest, longest = length == line.lengths[0], length == line.lengths[-1]
        if line.fine:
            momentum = (_means(problem, here.plan) - rates) / length / fine
            fine *= 0.4 if shortest else 1.6 if longest else 0.8
        else:
            fine *= 0.8
            coarse *= 0.5 if shortest else 1.0


def _excerpt(
    problem: Problem, iteration: int, share: float, *, blocks: bool, parts: bool
) -> tuple[range, Cells | None]:
    """The sequences that are probed this time, another part each time, and as many cells as `share` pays for."""
    for length in range(max(1, problem.samples // 4), 0, -1):
        first = iteration * length % problem.samples
        part = range(first, min(first + length, problem.samples))
        cost = len(part) / problem.samples
        coarse = len(Cells.of(problem.layout, most=1, blocks=blocks, parts=parts).axes)
        most = int(2 * (share / cost - 2 * coarse - 1))
        cells = Cells.of(problem.layout, most=most, blocks=blocks, parts=parts)
        wanted = Cells.of(problem.layout, most=len(problem.layout.specs), blocks=blocks, parts=parts)
        if most >= cells.count and (length == 1 or cells.count == wanted.count):
            return part, cells
    return range(0), None


def _lines(
    problem: Problem,
    plan: Plan,
    rates: Float64[Tensor, " linears"],
    cells: Cells,
    part: range,
    momentum: Float64[Tensor, " linears"] | None,
    *,
    fine: float,
    coarse: float,
    drops: bool,
    left: float,
) -> tuple[list[_Line], float]:
    """What the probes at `plan` suggest and their cost in evaluations; nothing if that is more than `left`.

    Probed are: `plan` itself, each cell denser, each axis up, each axis down and, with `drops`, each part of a block
    (of neighboring blocks, where cells have several) without weights.
    """
    changes: list[Counts] = [{}]
    weights = []
    for members in cells.members(problem.layout):
        change = {linear: _shifted(problem, plan, linear) for linear in members}
        changes.append(change)
        weights.append(sum(int((plan.removed[linear] - counts).sum()) for linear, counts in change.items()))
    step = _AXIS_STEP * max(_LEAST_SCALE, coarse)
    for sign in (1, -1):
        changes += [_plan(problem, rates + sign * step * axis).removed for axis in cells.axes]
    emptied = [(1 - rates) * (cells.part == number) for number in range(int(cells.part.max()) + 1)] if drops else []
    changes += [_plan(problem, rates + move).removed for move in emptied]
    cost = _cost(problem, changes, part)
    if cost > left:
        return [], 0.0
    values = problem.probe.changed(plan, changes, part)
    here, probed = values[0], values[1 : 1 + cells.count]
    if not 0 < here < math.inf:
        return [], cost
    gains = [
        math.log(here / value) / weight if weight and 0 < value < math.inf else 0.0
        for value, weight in zip(probed, weights, strict=True)
    ]
    lines = []
    for pooled in _POOLED:
        direction = fine_direction(cells, torch.tensor(gains, dtype=torch.float64), pooled=pooled)
        direction = direction if momentum is None else direction + _MOMENTUM * momentum
        lines.append(_Line(direction=fine * direction, lengths=_FINE, fine=True))
    if len(cells.axes):
        first, last = 1 + cells.count, 1 + cells.count + 2 * len(cells.axes)
        ups, downs = torch.tensor(values[first:last], dtype=torch.float64).view(2, -1).tolist()
        downhill = coarse * coarse_direction(cells, here, ups, downs, step=step, largest=_AXIS_LARGEST)
        lines.append(_Line(direction=downhill, lengths=_COARSE, fine=False))
        lines.append(_Line(direction=downhill + _FINE_SHARE * lines[-2].direction, lengths=_BOTH, fine=False))
    without = values[len(values) - len(emptied) :]
    better = sorted((value, number) for number, value in enumerate(without) if value < here)[:_MOST_EMPTIED]
    move = torch.zeros_like(rates)
    for _, number in better:
        move = move + emptied[number]
        lines.append(_Line(direction=move, lengths=(1.0,), fine=False))
    return lines, cost


def _cost(problem: Problem, changes: Sequence[Counts], part: range) -> float:
    """Evaluations that `changed` takes: the blocks from each first change on, and one pass through all before."""
    num_blocks = problem.layout.num_blocks
    firsts = [min((linear.block for linear in change), default=num_blocks) for change in changes]
    passed = sum(num_blocks - first for first in firsts) + max(firsts)
    return len(part) / problem.samples * passed / num_blocks


def _shifted(problem: Problem, plan: Plan, linear: Linear) -> Tensor:
    """The counts of a linear at a lower rate, or at a higher one where there is hardly any sparsity to give up."""
    spec = problem.layout[linear]
    removed = plan.removed[linear]
    if problem.levels or problem.pattern is not None:
        unit = 1 / (problem.pattern.group if problem.pattern is not None else problem.levels)
        shift = unit * max(1, round(_PROBE / unit))
    else:
        shift = _PROBE
    rate = float(removed.double().mean()) / spec.columns
    if rate < _PROBE_LEAST:
        shift = -shift
    if problem.levels:
        number = min(problem.levels, max(0, round((rate - shift) * problem.levels)))
        return level_counts(spec, number, problem.levels)
    return (removed - round(shift * spec.columns)).clamp(0, spec.columns).int()


def _plan(problem: Problem, means: Float64[Tensor, " linears"]) -> Plan:
    """The plan of one rate per linear."""
    rates = {
        spec.linear: torch.full((spec.rows,), mean, dtype=torch.float64)
        for spec, mean in zip(problem.layout, means.tolist(), strict=True)
    }
    return problem.plan(rates, rows_adapted=False)


def _means(problem: Problem, plan: Plan) -> Float64[Tensor, " linears"]:
    """The rate of each linear under `plan`."""
    return torch.tensor(
        [int(plan.removed[spec.linear].sum()) / spec.size for spec in problem.layout], dtype=torch.float64
    )


def _rates(problem: Problem, plan: Plan) -> Rates:
    """The rates of the rows under `plan`."""
    return {spec.linear: plan.removed[spec.linear].double() / spec.columns for spec in problem.layout}


def _spread_rows(hunt: _Hunt) -> None:
    """Step 3 of `allocate`."""
    problem = hunt.problem
    assert hunt.best is not None
    plan = hunt.best.plan
    rates = _rates(problem, plan)
    differences = problem.probe.differences(plan)
    hunt.left -= _DIFFERENCES_COST
    removed = {linear: int(counts.sum()) for linear, counts in plan.removed.items()}
    joint: dict[Linear, Tensor] = {}
    for found in problem.probe.measure(partial(joint_rates, removed=removed)):
        joint |= found
    candidates = [_by_difference(rates, differences, lam) for lam in _ROW_LAMBDAS]
    candidates += [{name: rate + share * (joint[name] - rate) for name, rate in rates.items()} for share in _ROW_SHARES]
    hunt.compare([problem.plan(candidate, rows_adapted=True) for candidate in candidates], hunt.best)


def _by_difference(rates: Rates, differences: Mapping[Linear, Float64[Tensor, " rows"]], lam: float) -> Rates:
    """Rates of width 2 * lam over the rows of each linear: the larger the difference of a row's outputs, the denser."""
    moved = dict(rates)
    for linear, difference in differences.items():
        moved[linear] = 1 - spread(difference, lam=lam, mean=1 - float(rates[linear].mean()))
    return moved


def joint_rates(linears: Sequence[Weighed], *, removed: Mapping[Linear, int]) -> dict[Linear, Float64[Tensor, " rows"]]:
    """Rates of the rows if the weights of least |W_ij| * a_j of the whole linear went, as many as `removed` says."""
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
