"""Plans of whole levels follow the rates, and meet the budget as nearly as levels allow."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import Shapes, layout_of, water_filled

from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.level_plan import level_counts, level_of, level_plan, levels_around, whole_levels
from neuronal_ray.core.plan import Rates


def rates_of(layout: Layout, means: list[float]) -> Rates:
    return {
        spec.linear: torch.full((spec.rows,), mean, dtype=torch.float64)
        for spec, mean in zip(layout, means, strict=True)
    }


THREE = layout_of([[(8, 10), (6, 20)], [(8, 10), (4, 5)]])


@given(
    means=st.lists(st.integers(0, 1000).map(lambda number: number / 1000), min_size=4, max_size=4),
    target=st.integers(0, 100).map(lambda number: number / 100),
)
def test_the_budget_is_missed_by_half_a_step_at_most(means: list[float], target: float) -> None:
    levels = 10
    budget = round(target * THREE.prunable)
    numbers = whole_levels(THREE, rates_of(THREE, means), budget=budget, levels=levels)
    plan = level_plan(THREE, rates_of(THREE, means), target=target, levels=levels)
    plan.check(THREE)
    for spec in THREE:
        assert 0 <= numbers[spec.linear] <= levels
        assert int(plan.removed[spec.linear].sum()) == numbers[spec.linear] * spec.size // levels
    assert abs(plan.total - budget) <= max(spec.size for spec in THREE) / levels / 2


def literal(layout: Layout, means: list[float], budget: int, levels: int) -> tuple[dict[Linear, int], int]:
    """Each linear's level before single ones are raised, and the total after, trying every set of linears."""
    steps = {spec.linear: spec.rows * spec.columns // levels for spec in layout}
    units: list[list[Linear]] = []
    rates: list[float] = []
    for spec, mean in zip(layout, means, strict=True):
        for unit, rate in zip(units, rates, strict=True):
            if unit[0].block == spec.linear.block and rate == mean:
                unit.append(spec.linear)
                break
        else:
            units.append([spec.linear])
            rates.append(mean)
    weights = [sum(steps[linear] for linear in unit) for unit in units]
    wanted = [round(levels * rate, 6) for rate in water_filled(rates, [levels * weight for weight in weights], budget)]
    numbers = [math.floor(number) for number in wanted]
    missing = budget - sum(number * weight for number, weight in zip(numbers, weights, strict=True))
    for unit in sorted(range(len(units)), key=lambda unit: (-round(wanted[unit] - numbers[unit], 6), unit)):
        if numbers[unit] < levels and weights[unit] <= missing:
            numbers[unit] += 1
            missing -= weights[unit]
    of_linear = {linear: number for unit, number in zip(units, numbers, strict=True) for linear in unit}
    spare = [steps[linear] for linear, number in of_linear.items() if number < levels]
    sums = {sum(chosen) for count in range(len(spare) + 1) for chosen in itertools.combinations(spare, count)}
    return of_linear, budget - missing + min(sums, key=lambda total: (abs(total - missing), total))


MEANS = st.sampled_from([0.1, 0.3, 0.55, 0.7, 0.85])  # linears of a block are often given the same rate


@st.composite
def cases(draw: st.DrawFn, columns: list[int]) -> tuple[Shapes, list[float], float]:
    shape = st.tuples(st.integers(2, 8), st.sampled_from(columns))
    blocks = draw(st.lists(st.lists(shape, min_size=1, max_size=3), min_size=1, max_size=3))
    count = sum(len(shapes) for shapes in blocks)
    means = draw(st.lists(MEANS, min_size=count, max_size=count))
    return blocks, means, draw(st.one_of(st.floats(0, 1), st.integers(0, 20).map(lambda number: number / 20)))


@given(case=cases(columns=[20, 40, 60]))
def test_a_plan_is_what_its_rule_says(case: tuple[Shapes, list[float], float]) -> None:
    blocks, means, target = case
    layout = layout_of(blocks)
    budget = round(target * layout.prunable)
    plan = level_plan(layout, rates_of(layout, means), target=target, levels=20)
    before, total = literal(layout, means, budget, 20)
    assert plan.total == total
    found = whole_levels(layout, rates_of(layout, means), budget=budget, levels=20)
    assert {found[linear] - before[linear] for linear in found} <= {0, 1}, (found, before)


@given(case=cases(columns=[7, 9, 13, 31]), levels=st.sampled_from([8, 10, 20]))
def test_sizes_that_are_no_multiples_miss_by_two_weights_per_linear_more(
    case: tuple[Shapes, list[float], float], levels: int
) -> None:
    blocks, means, target = case
    layout = layout_of(blocks)
    budget = round(target * layout.prunable)
    plan = level_plan(layout, rates_of(layout, means), target=target, levels=levels)
    plan.check(layout)
    found = whole_levels(layout, rates_of(layout, means), budget=budget, levels=levels)
    for spec in layout:
        removed = int(plan.removed[spec.linear].sum())
        assert removed == math.floor(found[spec.linear] * spec.size / levels)
        if spec.size >= 2 * levels:
            assert level_of(spec, removed, levels) == found[spec.linear]
    half = max(spec.size // levels for spec in layout) / 2
    assert abs(plan.total - budget) <= half + 2 * len(layout.specs), (plan.total, budget)


@given(case=cases(columns=[7, 20, 40]))
def test_of_one_size_the_higher_rate_never_has_the_lower_level(case: tuple[Shapes, list[float], float]) -> None:
    blocks, means, target = case
    layout = layout_of(blocks)
    numbers = whole_levels(layout, rates_of(layout, means), budget=round(target * layout.prunable), levels=20)
    asked = dict(zip(layout.specs, means, strict=True))
    for one, other in itertools.permutations(layout.specs, 2):
        if one.size == other.size and asked[one] > asked[other]:
            assert numbers[one.linear] >= numbers[other.linear], (numbers, means)


def test_rates_that_are_levels_are_kept() -> None:
    means = [0.25, 0.5, 0.75, 0.5]
    target = sum(mean * spec.size for mean, spec in zip(means, THREE, strict=True)) / THREE.prunable
    numbers = whole_levels(THREE, rates_of(THREE, means), budget=round(target * THREE.prunable), levels=20)
    assert list(numbers.values()) == [5, 10, 15, 10]


def test_linears_of_a_block_with_different_rates_get_different_levels() -> None:
    numbers = whole_levels(THREE, rates_of(THREE, [0.2, 0.8, 0.2, 0.8]), budget=round(0.52 * THREE.prunable), levels=10)
    assert numbers[Linear(0, "linear0")] < numbers[Linear(0, "linear1")]


@pytest.mark.parametrize("number", range(11))
def test_a_level_is_spread_evenly_the_first_rows_losing_one_more(number: int) -> None:
    (spec,) = layout_of([[(7, 9)]])
    counts = level_counts(spec, number, 10).tolist()
    total = number * 63 // 10
    assert sum(counts) == total
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1
    assert level_of(spec, total, 10) == number


def test_the_levels_worth_solving_reach_from_well_below_the_target_to_the_last() -> None:
    assert levels_around(0.7, 20) == tuple(range(8, 20))
    assert levels_around(0.1, 20) == tuple(range(1, 20))
    assert levels_around(0.7, 8) == tuple(range(3, 8))
    assert all(level < 20 for target, level in itertools.product((0.0, 0.99), levels_around(0.99, 20)))
