"""Do plans of whole levels follow the rates they are asked for, as near to the budget as levels reach?"""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.levels import level_counts, level_of, level_plan, levels_around, whole_levels
from neuronal_ray.core.plan import Rates


def layout_of(*blocks: list[tuple[int, int]]) -> Layout:
    """One linear per shape."""
    return Layout(
        tuple(
            LinearSpec(
                linear=Linear(block, f"linear{index}"),
                rows=rows,
                columns=columns,
                reads=Group(block, index),
                consumer=None,
                sources=None,
            )
            for block, shapes in enumerate(blocks)
            for index, (rows, columns) in enumerate(shapes)
        )
    )


def rates_of(layout: Layout, means: list[float]) -> Rates:
    return {
        spec.linear: torch.full((spec.rows,), mean, dtype=torch.float64)
        for spec, mean in zip(layout, means, strict=True)
    }


THREE = layout_of([(8, 10), (6, 20)], [(8, 10), (4, 5)])


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


def test_rates_that_are_levels_are_kept() -> None:
    means = [0.25, 0.5, 0.75, 0.5]
    target = sum(mean * spec.size for mean, spec in zip(means, THREE, strict=True)) / THREE.prunable
    numbers = whole_levels(THREE, rates_of(THREE, means), budget=round(target * THREE.prunable), levels=20)
    assert list(numbers.values()) == [5, 10, 15, 10]


def test_linears_of_a_block_that_are_asked_differently_get_different_levels() -> None:
    numbers = whole_levels(THREE, rates_of(THREE, [0.2, 0.8, 0.2, 0.8]), budget=round(0.52 * THREE.prunable), levels=10)
    assert numbers[Linear(0, "linear0")] < numbers[Linear(0, "linear1")]


@pytest.mark.parametrize("number", range(11))
def test_a_level_is_spread_evenly_the_first_rows_losing_one_more(number: int) -> None:
    (spec,) = layout_of([(7, 9)])
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
