"""Plans in which every linear removes a multiple of 1 / levels of its weights: solved levels and n:M patterns."""

from collections.abc import Sequence

import torch

from neuronal_ray.core.layout import Layout, Linear, LinearSpec
from neuronal_ray.core.plan import Plan, Rates, water_level

LEVELS = 20

_DECIMALS = 9
_LEVELS_BELOW = 0.3


def levels_around(target: float, levels: int) -> tuple[int, ...]:
    """Return the levels that a search around `target` may use: from 0.3 below it to the last that keeps a weight."""
    return tuple(range(max(1, round((target - _LEVELS_BELOW) * levels)), levels))


def level_plan(layout: Layout, rates: Rates, *, target: float, levels: int) -> Plan:
    """Return the plan of `whole_levels`; within a linear, rows differ by at most one weight (the first lose more)."""
    numbers = whole_levels(layout, rates, budget=round(target * layout.prunable), levels=levels)
    return Plan({spec.linear: level_counts(spec, numbers[spec.linear], levels) for spec in layout})


def level_counts(spec: LinearSpec, number: int, levels: int) -> torch.Tensor:
    """Return the removed weights per row, int32 [rows], of a linear at level `number`."""
    each, more = divmod(number * spec.size // levels, spec.rows)
    return each + (torch.arange(spec.rows) < more).int()


def level_of(spec: LinearSpec, removed: int, levels: int) -> int:
    """Return the level nearest to `removed` weights; the inverse of `level_counts` from 2 * levels weights on."""
    return round(removed * levels / spec.size)


def whole_levels(layout: Layout, rates: Rates, *, budget: int, levels: int) -> dict[Linear, int]:
    """Return a level n for each linear, which then loses n / levels of its weights; the total comes near to `budget`.

    The linears of a block that have the same rate form a unit with one level. The units' rates are moved by one
    offset and bounded to [0, 1] as in `exact_plan`, then rounded: first all down, then, in the order of largest
    remainder (ties: the earlier unit), up where the whole unit still fits into the budget. The rest of the budget is
    met by moving single linears one level up: those whose sum is nearest to the rest (ties: the smaller sum).

    Level n removes floor(n * size / levels) weights, and a level up is counted as floor(size / levels): where sizes
    are no multiples of `levels`, the budget is missed by up to two more weights per linear.
    """
    units: dict[tuple[int, float], list[LinearSpec]] = {}
    for spec in layout:
        rate = round(float(rates[spec.linear].mean()), _DECIMALS)
        units.setdefault((spec.linear.block, rate), []).append(spec)
    members = list(units.values())
    sizes = torch.tensor([sum(spec.size for spec in specs) for specs in members], dtype=torch.float64)
    sums = [sum(float(rates[spec.linear].mean()) * spec.size for spec in specs) for specs in members]
    means = torch.tensor(sums, dtype=torch.float64) / sizes
    wanted = (water_level(means, sizes, float(budget)) * levels).round(decimals=_DECIMALS)  # noise must not break ties
    floors = wanted.floor()
    remainders = (wanted - floors).round(decimals=_DECIMALS)
    of_unit = floors.long().tolist()
    missing = budget - sum(
        count * spec.size // levels for count, specs in zip(of_unit, members, strict=True) for spec in specs
    )
    up, down = [], []
    for unit in remainders.argsort(descending=True, stable=True).tolist():
        step = sum(spec.size // levels for spec in members[unit])
        if of_unit[unit] < levels and step <= missing:
            of_unit[unit] += 1
            missing -= step
            up.append(unit)
        else:
            down.append(unit)
    counts = {spec.linear: number for number, specs in zip(of_unit, members, strict=True) for spec in specs}
    spare = [spec for unit in down + up for spec in members[unit] if counts[spec.linear] < levels]
    for spec in _nearest_sum(spare, missing, levels):
        counts[spec.linear] += 1
    return counts


def _nearest_sum(specs: Sequence[LinearSpec], missing: int, levels: int) -> list[LinearSpec]:
    """Return the linears whose weights per level add up nearest to `missing`; of equal sums, prefer larger linears.

    Models have few distinct sizes of linears, so the distinct sums are few, too.
    """
    by_step: dict[int, list[LinearSpec]] = {}
    for spec in specs:
        by_step.setdefault(spec.size // levels, []).append(spec)
    steps = sorted((step for step in by_step if step > 0), reverse=True)
    sums: dict[int, tuple[int, ...]] = {0: ()}  # for each sum, how many linears of each step, in order, give it
    for step in steps:
        longer: dict[int, tuple[int, ...]] = {}
        for total, numbers in sums.items():
            enough = min(len(by_step[step]), max(0, -((total - missing) // step)))  # the least that reaches `missing`
            for number in range(enough + 1):
                reached = total + number * step
                longer[reached] = max(longer.get(reached, ()), (*numbers, number))
        sums = longer
    nearest = min(sums, key=lambda total: (abs(total - missing), total))
    chosen = []
    for step, number in zip(steps, sums[nearest], strict=True):
        chosen += by_step[step][:number]
    return chosen
