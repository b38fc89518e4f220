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

from neuronal_ray import plugins
from neuronal_ray.allocations import Allocation, Problem, Step
from neuronal_ray.allocations.neuronal import block_rates
from neuronal_ray.config import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.directions import Cells, coarse_direction, fine_direction
from neuronal_ray.core.layout import Linear, Weighed
from neuronal_ray.core.masks import smallest
from neuronal_ray.core.plan import Counts, Plan, Rates, uniform_rates
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.rows import row_rates

STATISTIC: type[Statistic] | None = SquareSum

FINE = (0.05, 0.12, 0.25)
COARSE = (0.35, 0.7, 1.2)
_BOTH = (0.5, 1.0)
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


def _better(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether less on the even sequences and on the odd ones: what helps one half only fits its noise."""
    halves = [slice(0, None, 2), slice(1, None, 2)] if len(ours) > 1 else [slice(None)]
    return all(_mean(ours[half]) < _mean(theirs[half]) for half in halves)


@dataclass(frozen=True, kw_only=True, eq=False)
class _State:
    """The best plan so far, with its divergence on each search sequence."""

    plan: Plan
    divergences: tuple[float, ...]
    number: int

    @property
    def score(self) -> float:
        return _mean(self.divergences)


class _Hunt:
    """Asks for candidates within the budget, and remembers the best."""

    def __init__(self, problem: Problem, budget: int) -> None:
        self.problem, self.left = problem, float(budget)
        self.scores: list[float] = []
        self.best: _State | None = None

    def offer(self, plans: Sequence[Plan], found: Sequence[tuple[float, ...]]) -> int | None:
        """Take the best of the candidates if it is better on both halves of the text; its index, else None."""
        first = len(self.scores)
        self.scores += [_mean(divergences) for divergences in found]
        chosen = None
        for index in sorted(range(len(plans)), key=lambda index: self.scores[first + index]):
            if self.best is None or _better(found[index], self.best.divergences):
                self.best = _State(plan=plans[index], divergences=found[index], number=first + index)
                chosen = index
                break
        return chosen

    def compare(self, plans: Sequence[Plan]) -> int | None:
        """`offer` of as many plans as the budget allows."""
        plans, numbers = self._affordable(plans)
        return self.offer(plans, self.problem.probe.divergences("adaptive", numbers, plans)) if plans else None

    def tries(self, plans: Sequence[Plan]) -> list[Trial]:
        """`compare` with all that a trial tells of the plans."""
        plans, numbers = self._affordable(plans)
        trials = self.problem.probe.tries("adaptive", numbers, plans) if plans else []
        self.offer(plans, [trial.divergences for trial in trials])
        return trials

    def _affordable(self, plans: Sequence[Plan]) -> tuple[Sequence[Plan], list[float]]:
        """The first plans, paid for, and their numbers in the record."""
        plans = plans[: max(0, int(self.left))]
        self.left -= len(plans)
        return plans, [float(len(self.scores) + index) for index in range(len(plans))]

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
    block_lambdas: Sequence[float] = LAMBDAS,
    row_lambdas: Sequence[float] = ROW_LAMBDAS,
) -> Allocation:
    """Rates of least KL divergence from the dense model on the search text, of no more than `budget` evaluations.

    1. Start from the best of uniform, NeuronAL's block candidates and the allocations named in `starts`.
    2. `iterations` times: probe every cell (linears of a kind in neighboring blocks) and every coarse direction on a
       quarter of the text, then compare steps of several lengths on all of it (core/directions.py).
    3. Compare spreads over the rows of each linear: by the difference of their outputs, and by the energy they lose.

    A candidate is taken only if it is better on both halves of the sequences. The uniform plan and NeuronAL's block and
    row winners (by alignment, as published) are candidates, so none of them diverges less, up to that rule. An
    evaluation is one pass of the whole search text; a probe counts by its tokens and blocks.
    """
    if problem.criterion != "kl":
        raise ValueError("--allocation adaptive: compares by --criterion kl only; for alignment use neuronal")
    if problem.mode == "authors":
        raise ValueError("--allocation adaptive: not in the released code; use --mode best")
    if budget < 1:
        raise ValueError(f"--search-budget: {budget} is not positive")
    if iterations < 0:
        raise ValueError(f"--set allocation.iterations: {iterations}, expected 0 or more")
    names = _names(starts)
    rows = rows and problem.pattern is None and not problem.levels
    hunt = _Hunt(problem, budget)
    baselines = _start(hunt, names, block_lambdas, row_lambdas if rows else ())
    assert hunt.best is not None
    if hunt.best.score > 0:
        if blocks or parts:
            _move(hunt, iterations, _ROWS_COST if rows else 0, blocks=blocks, parts=parts)
        if rows and hunt.left > _DIFFERENCES_COST:
            _spread_rows(hunt)
    plan = hunt.best.plan
    return Allocation(plan=plan, rates=_rates(problem, plan), steps=(hunt.step(),), baselines=baselines)


def _names(starts: str) -> list[str]:
    names = [name.strip() for name in starts.split(",") if name.strip()]
    for name in names:
        if name not in _STARTS:
            raise ValueError(f"--set allocation.starts: {name!r}, expected some of: {', '.join(_STARTS)}")
    return names


def _start(
    hunt: _Hunt, names: Sequence[str], block_lambdas: Sequence[float], row_lambdas: Sequence[float]
) -> dict[str, Plan]:
    """Step 1 of `allocate`; the plans to compare with, NeuronAL's winners by its own criterion among them."""
    problem = hunt.problem
    uniform = problem.plan(uniform_rates(problem.layout, lambda _: problem.target), rows_adapted=False)
    plans = [uniform]
    plans += [plugins.load("allocations", name).allocate(problem).plan for name in names if name != "neuronal"]
    lambdas = block_lambdas if "neuronal" in names else ()
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


def _move(hunt: _Hunt, iterations: int, reserved: int, *, blocks: bool, parts: bool) -> None:
    """Step 2 of `allocate`."""
    problem = hunt.problem
    fine, coarse, previous = 1.0, 1.0, None
    for iteration in range(iterations):
        share = (hunt.left - reserved) / (iterations - iteration)
        part, cells = _excerpt(problem, iteration, share - _num_candidates(), blocks=blocks, parts=parts)
        if cells is None:
            break
        assert hunt.best is not None
        here = hunt.best.plan
        rates = _means(problem, here)
        direction, downhill, cost = _directions(problem, here, rates, cells, part, coarse)
        hunt.left -= cost
        if previous is not None:
            direction = direction + _MOMENTUM * previous
        moves = [length * fine * direction for length in FINE]
        if bool(downhill.any()):
            moves += [length * coarse * downhill for length in COARSE]
            moves += [length * (coarse * downhill + 0.25 * fine * direction) for length in _BOTH]
        chosen = hunt.compare([_plan(problem, rates + move) for move in moves])
        logger.info("iteration %d: divergence %.4g", iteration + 1, hunt.best.score)
        previous = None
        if chosen is None:
            fine, coarse = 0.4 * fine, 0.4 * coarse
        elif chosen < len(FINE):
            previous = (_means(problem, hunt.best.plan) - rates) / (FINE[chosen] * fine)
            fine *= 0.5 if chosen == 0 else 1.4 if chosen == len(FINE) - 1 else 1.0
        else:
            fine *= 0.8
            coarse *= 0.5 if chosen == len(FINE) else 1.0


def _num_candidates() -> int:
    return len(FINE) + len(COARSE) + len(_BOTH)


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


def _directions(
    problem: Problem, plan: Plan, rates: Float64[Tensor, " linears"], cells: Cells, part: range, scale: float
) -> tuple[Float64[Tensor, " linears"], Float64[Tensor, " linears"], float]:
    """The fine and the coarse direction at `plan`, and what asking for them cost."""
    specs = list(problem.layout)
    changes: list[Counts] = [{}]
    weights = []
    for cell in range(cells.count):
        members = [spec for spec, number in zip(specs, cells.cell.tolist(), strict=True) if number == cell]
        change = {spec.linear: _shifted(problem, plan, spec.linear) for spec in members}
        changes.append(change)
        weights.append(sum(int((plan.removed[linear] - counts).sum()) for linear, counts in change.items()))
    step = _AXIS_STEP * max(0.25, scale)
    for sign in (1, -1):
        changes += [_plan(problem, rates + sign * step * axis).removed for axis in cells.axes]
    values = problem.probe.changed(plan, changes, part)
    here, probed = values[0], values[1 : 1 + cells.count]
    ups, downs = torch.tensor(values[1 + cells.count :]).view(2, -1).tolist()
    if not 0 < here < math.inf:
        return torch.zeros_like(rates), torch.zeros_like(rates), _cost(problem, changes, part)
    gains = [
        (math.log(here) - math.log(max(value, 1e-300))) / weight if weight else 0.0
        for value, weight in zip(probed, weights, strict=True)
    ]
    fine = fine_direction(cells, torch.tensor(gains, dtype=torch.float64))
    coarse = coarse_direction(cells, here, ups, downs, step=step, largest=_AXIS_LARGEST)
    return fine, coarse, _cost(problem, changes, part)


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
        unit = 1 / (problem.levels or problem.pattern.group)  # type: ignore[union-attr]
        shift = unit * max(1, round(_PROBE / unit))
    else:
        shift = _PROBE
    rate = float(removed.double().mean()) / spec.columns
    if rate < _PROBE_LEAST:
        shift = -shift
    if problem.levels:
        return _level_counts(problem, linear, rate - shift)
    return (removed - round(shift * spec.columns)).clamp(0, spec.columns).int()


def _level_counts(problem: Problem, linear: Linear, rate: float) -> Tensor:
    """The counts of a linear at the level nearest to `rate`, shared evenly among its rows."""
    spec = problem.layout[linear]
    level = min(problem.levels, max(0, round(rate * problem.levels)))
    each, more = divmod(round(level * spec.size / problem.levels), spec.rows)
    return each + (torch.arange(spec.rows) < more).int()


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
    hunt.compare([problem.plan(candidate, rows_adapted=True) for candidate in candidates])


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
