"""Plans in which every linear removes one of a few shares of its weights: n of M, for a number M of levels."""

from collections.abc import Sequence

import torch

from neuronal_ray.core.layout import Layout, Linear, LinearSpec
from neuronal_ray.core.plan import Plan, Rates, water_level

LEVELS = 20

_DECIMALS = 9
_LEVELS_BELOW = 0.3


def levels_around(target: float, levels: int) -> tuple[int, ...]:
    """The levels that a search around `target` may ask for: from 0.3 below it to the last that keeps something."""
    return tuple(range(max(1, round((target - _LEVELS_BELOW) * levels)), levels))


def level_plan(layout: Layout, rates: Rates, *, target: float, levels: int) -> Plan:
    """The plan of `whole_levels`, each linear's weights spread evenly over its rows (the first ones lose one more)."""
    numbers = whole_levels(layout, rates, budget=round(target * layout.prunable), levels=levels)
    return Plan({spec.linear: level_counts(spec, numbers[spec.linear], levels) for spec in layout})


def level_counts(spec: LinearSpec, number: int, levels: int) -> torch.Tensor:
    """Removed weights per row, int32 [rows], of a linear at one level."""
    each, more = divmod(number * spec.size // levels, spec.rows)
    return each + (torch.arange(spec.rows) < more).int()


def level_of(spec: LinearSpec, removed: int, levels: int) -> int:
    """The level nearest to `removed` weights of the linear; its own one for a linear of at least 2 * levels weights."""
    return round(removed * levels / spec.size)


def whole_levels(layout: Layout, rates: Rates, *, budget: int, levels: int) -> dict[Linear, int]:
    """For each linear a number n: it loses n / levels of its weights; in all as near to `budget` as they reach.

    The linears of a block that are asked the same rate are a unit with one n, but for a few. The units' rates are moved
    by one offset and bounded to [0, 1] as in `exact_plan`, then rounded: all down, then up in the order of largest
    remainder (ties: the earlier unit) while the next whole unit still fits in the budget. What is missing then is made
    up by linears that go one level up, those whose sum is nearest to it (ties: the smaller sum).

    Level n removes floor(n * size / levels) weights, and a level up is counted as floor(size / levels): of sizes that
    are no multiples of `levels` the budget is missed by up to two weights per linear more.
    """
    units: dict[tuple[int, float], list[LinearSpec]] = {}
    for spec in layout:
        rate = round(float(rates[spec.linear].mean()), _DECIMALS)
        units.setdefault((spec.linear.block, rate), []).append(spec)
    members = list(units.values())
    sizes = torch.tensor([sum(spec.size for spec in specs) for specs in members], dtype=torch.float64)
    sums = [sum(float(rates[spec.linear].mean()) * spec.size for spec in specs) for specs in members]
    means = torch.tensor(sums, dtype=torch.float64) / sizes
    wanted = (water_level(means, sizes, float(budget)) * levels).round(decimals=_DECIMALS)  # noise made a tie
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
    """The linears whose weights per level add up nearest to `missing`; of equal sums those with more of the largest.

    Models have few sizes of linears: the sums that any number of each size can give are few, too.
    """
    by_step: dict[int, list[LinearSpec]] = {}
    for spec in specs:
        by_step.setdefault(spec.size // levels, []).append(spec)
    steps = sorted((step for step in by_step if step > 0), reverse=True)
    sums: dict[int, tuple[int, ...]] = {0: ()}  # a sum and how many of each size, in the order of `steps`, make it
    for step in steps:
        longer: dict[int, tuple[int, ...]] = {}
        for total, numbers in sums.items():
            enough = min(len(by_step[step]), max(0, -((total - missing) // step)))  # the first that is not below
            for number in range(enough + 1):
                reached = total + number * step
                longer[reached] = max(longer.get(reached, ()), (*numbers, number))
        sums = longer
    nearest = min(sums, key=lambda total: (abs(total - missing), total))
    chosen = []
    for step, number in zip(steps, sums[nearest], strict=True):
        chosen += by_step[step][:number]
    return chosen
