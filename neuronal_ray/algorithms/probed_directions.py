"""Directions in which the rates of linears should move, from probes of many small changes of one plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from neuronal_ray.core.directions import Cells, coarse_direction, fine_direction
from neuronal_ray.core.layout import Linear
from neuronal_ray.core.level_plan import level_counts
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import Problem

# Chosen by hand on five of the small models of docs/results/quality.md.
_FINE = (0.04, 0.1, 0.25)  # lengths, in units of rate
_COARSE = (0.35, 0.7, 1.2)  # fractions of the way to the minima of the parabolas
_BOTH = (0.5, 1.0)
_POOLED = (0.0, 0.5)
_FINE_SHARE = 0.25
_MOST_EMPTIED = 3
_LEAST_SCALE = 0.25
_PROBE = 0.1  # change of a cell's rate whose effect is measured
_PROBE_LEAST = 0.03
_AXIS_STEP, _AXIS_LARGEST = 0.06, 0.16
_MOMENTUM = 0.3

NUM_CANDIDATES = len(_POOLED) * len(_FINE) + len(_COARSE) + len(_BOTH)
"""The candidates that `lines` suggests, without those that empty a sub-block."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Line:
    """Candidates in one direction: moves of the linears' rates, and how far to go."""

    direction: Float64[Tensor, " linears"]
    lengths: tuple[float, ...]
    fine: bool


def affordable_cells(
    problem: Problem, iteration: int, share: float, *, blocks: bool, parts: bool
) -> tuple[range, Cells | None]:
    """Return the search sequences to probe on in this iteration, and as many cells as `share` evaluations pay for.

    The sequences take turns; there are fewer of them where `share` is small, and no cells where it is too small.
    """
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


def lines(
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
) -> tuple[list[Line], float]:
    """Probe changes of `plan` on the sequences in `part`; return the lines they suggest and the cost in evaluations.

    The probes are `plan` itself, each cell denser, each axis up, each axis down and, with `drops`, each sub-block (of
    neighboring blocks, where cells span several) without weights. Nothing is probed if the cost is above `left`.
    """
    changes: list[Counts] = [{}]
    weights = []
    for members in cells.members(problem.layout):
        change = {linear: _shifted(problem, plan, linear) for linear in members}
        changes.append(change)
        weights.append(sum(int((plan.removed[linear] - counts).sum()) for linear, counts in change.items()))
    step = _AXIS_STEP * max(_LEAST_SCALE, coarse)
    for sign in (1, -1):
        changes += [plan_of_means(problem, rates + sign * step * axis).removed for axis in cells.axes]
    emptied = (
        [(1 - rates) * (cells.sub_block == number) for number in range(int(cells.sub_block.max()) + 1)] if drops else []
    )
    changes += [plan_of_means(problem, rates + move).removed for move in emptied]
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
    suggested = []
    for pooled in _POOLED:
        direction = fine_direction(cells, torch.tensor(gains, dtype=torch.float64), pooled=pooled)
        direction = direction if momentum is None else direction + _MOMENTUM * momentum
        suggested.append(Line(direction=fine * direction, lengths=_FINE, fine=True))
    if len(cells.axes):
        first, last = 1 + cells.count, 1 + cells.count + 2 * len(cells.axes)
        ups, downs = torch.tensor(values[first:last], dtype=torch.float64).view(2, -1).tolist()
        downhill = coarse * coarse_direction(cells, here, ups, downs, step=step, largest=_AXIS_LARGEST)
        suggested.append(Line(direction=downhill, lengths=_COARSE, fine=False))
        suggested.append(Line(direction=downhill + _FINE_SHARE * suggested[-2].direction, lengths=_BOTH, fine=False))
    without = values[len(values) - len(emptied) :]
    better = sorted((value, number) for number, value in enumerate(without) if value < here)[:_MOST_EMPTIED]
    move = torch.zeros_like(rates)
    for _, number in better:
        move = move + emptied[number]
        suggested.append(Line(direction=move, lengths=(1.0,), fine=False))
    return suggested, cost


def _cost(problem: Problem, changes: Sequence[Counts], part: range) -> float:
    """Return the evaluations that `Probe.changed` takes: for each change the blocks from its first on, and one pass."""
    num_blocks = problem.layout.num_blocks
    firsts = [min((linear.block for linear in change), default=num_blocks) for change in changes]
    passed = sum(num_blocks - first for first in firsts) + max(firsts)
    return len(part) / problem.samples * passed / num_blocks


def _shifted(problem: Problem, plan: Plan, linear: Linear) -> Tensor:
    """Return the counts of a linear at a lower rate, or at a higher rate if it is hardly sparse."""
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


def plan_of_means(problem: Problem, means: Float64[Tensor, " linears"]) -> Plan:
    """Return the plan of one rate per linear."""
    rates = {
        spec.linear: torch.full((spec.rows,), mean, dtype=torch.float64)
        for spec, mean in zip(problem.layout, means.tolist(), strict=True)
    }
    return problem.plan(rates, rows_adapted=False)


def means_of_plan(problem: Problem, plan: Plan) -> Float64[Tensor, " linears"]:
    """Return the rate of each linear under `plan`."""
    return torch.tensor(
        [int(plan.removed[spec.linear].sum()) / spec.size for spec in problem.layout], dtype=torch.float64
    )
