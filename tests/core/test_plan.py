"""Plans meet their budget exactly for any rates, and refuse other models."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import layout_of, water_filled

from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import (
    Plan,
    PlanError,
    Rates,
    exact_plan,
    floored_plan,
    largest_remainder,
    uniform_rates,
    water_level,
)

Shapes = list[tuple[int, int]]

ANY_RATE = st.one_of(
    st.floats(0, 1), st.floats(-3, 4), st.floats(-1e6, 1e6), st.sampled_from([0.0, 1.0, -5.0, 5.0, 0.5, 0.01, 0.99])
)
SIXTYFOURTHS = st.integers(-64, 128).map(lambda count: count / 64)


def in_pairs(shapes: Shapes) -> Layout:
    """Linears of these [rows, columns], two in a block."""
    return layout_of([shapes[start : start + 2] for start in range(0, len(shapes), 2)])


def rates_of(layout: Layout, values: list[list[float]]) -> Rates:
    return {
        spec.linear: torch.tensor(row_rates, dtype=torch.float64)
        for spec, row_rates in zip(layout, values, strict=True)
    }


def lists(plan: Plan) -> dict[Linear, list[int]]:
    return {linear: counts.tolist() for linear, counts in plan.removed.items()}


@st.composite
def shapes_and_rates(draw: st.DrawFn, rate: st.SearchStrategy[float]) -> tuple[Shapes, list[list[float]]]:
    shapes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40)), min_size=1, max_size=5))
    return shapes, [draw(st.lists(rate, min_size=rows, max_size=rows)) for rows, _ in shapes]


# -- the exact budget


@given(shapes_and_rates(ANY_RATE), st.floats(0, 1))
def test_an_exact_plan_removes_the_target_to_the_weight_and_fits(
    case: tuple[Shapes, list[list[float]]], target: float
) -> None:
    shapes, values = case
    layout = in_pairs(shapes)
    plan = exact_plan(layout, rates_of(layout, values), target=target)
    wanted = round(target * sum(rows * columns for rows, columns in shapes))
    assert plan.total == wanted, (plan.total, wanted, lists(plan))
    for spec in layout:
        counts = plan.removed[spec.linear]
        assert counts.dtype == torch.int32
        assert counts.shape == (spec.rows,)
        assert all(0 <= count <= spec.columns for count in counts.tolist()), (spec.columns, counts)
    plan.check(layout)


@pytest.mark.parametrize("target", [0.0, 1.0])
@given(case=shapes_and_rates(ANY_RATE))
def test_nothing_and_everything_are_targets(case: tuple[Shapes, list[list[float]]], target: float) -> None:
    shapes, values = case
    layout = in_pairs(shapes)
    plan = exact_plan(layout, rates_of(layout, values), target=target)
    for spec in layout:
        assert plan.removed[spec.linear].tolist() == [int(target) * spec.columns] * spec.rows


@given(st.data())
def test_rates_that_are_whole_counts_already_are_kept(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 40)), min_size=1, max_size=5))
    layout = in_pairs(shapes)
    counts = [data.draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)) for rows, columns in shapes]
    rates = rates_of(
        layout, [[count / columns for count in row] for row, (_, columns) in zip(counts, shapes, strict=True)]
    )
    plan = exact_plan(layout, rates, target=sum(map(sum, counts)) / layout.prunable)
    assert list(lists(plan).values()) == counts


@given(shapes_and_rates(ANY_RATE), st.floats(0, 1))
def test_linears_and_rows_get_their_water_filled_share_within_one_weight(
    case: tuple[Shapes, list[list[float]]], target: float
) -> None:
    shapes, values = case
    layout = in_pairs(shapes)
    plan = exact_plan(layout, rates_of(layout, values), target=target)
    means = [sum(row) / len(row) for row in values]
    sizes = [float(rows * columns) for rows, columns in shapes]
    shares = water_filled(means, sizes, round(target * sum(sizes)))
    for spec, share, size, row_values in zip(layout, shares, sizes, values, strict=True):
        counts = plan.removed[spec.linear].tolist()
        assert abs(sum(counts) - share * size) < 1 + 1e-3, (spec.linear, counts, share * size)
        row_shares = water_filled(row_values, [float(spec.columns)] * spec.rows, sum(counts))
        for count, row_share in zip(counts, row_shares, strict=True):
            assert abs(count - row_share * spec.columns) < 1 + 1e-3, (spec.linear, counts, row_shares)


@given(shapes_and_rates(SIXTYFOURTHS), SIXTYFOURTHS, st.floats(0, 1))
def test_a_constant_added_to_all_rates_changes_nothing(
    case: tuple[Shapes, list[list[float]]], shift: float, target: float
) -> None:
    shapes, values = case
    layout = in_pairs(shapes)
    rates = rates_of(layout, values)
    shifted = {linear: row_rates + shift for linear, row_rates in rates.items()}
    plan, other = (exact_plan(layout, given_rates, target=target) for given_rates in (rates, shifted))
    assert lists(plan) == lists(other)
    assert plan.digest == other.digest


def test_of_equal_rows_the_earlier_loses_the_weight_that_is_over() -> None:
    layout = in_pairs([(4, 5), (4, 5)])
    plan = exact_plan(layout, uniform_rates(layout, lambda _: 0.5), target=0.525)
    assert list(lists(plan).values()) == [[3, 3, 3, 2], [3, 3, 2, 2]]


def test_rates_already_at_their_bounds_are_moved_off_them() -> None:
    """No rate lies strictly between the bounds, so the first Newton step has no slope to follow."""
    layout = in_pairs([(2, 4), (2, 4)])
    rates = rates_of(layout, [[0.0, 0.0], [1.0, 1.0]])
    assert list(lists(exact_plan(layout, rates, target=0.25)).values()) == [[0, 0], [2, 2]]
    assert list(lists(exact_plan(layout, rates, target=0.75)).values()) == [[2, 2], [4, 4]]


def test_uniform_rates_are_one_rate_for_all_rows_of_a_block() -> None:
    rates = uniform_rates(in_pairs([(2, 4), (3, 4), (1, 4)]), lambda block: 0.25 + block / 2)
    assert [row.tolist() for row in rates.values()] == [[0.25] * 2, [0.25] * 3, [0.75]]


# -- its two parts


@given(st.lists(st.tuples(ANY_RATE, st.integers(1, 10_000)), min_size=1, max_size=12), st.floats(0, 1))
def test_the_water_level_is_the_one_that_bisection_finds(items: list[tuple[float, int]], share: float) -> None:
    rates = [rate for rate, _ in items]
    sizes = [float(size) for _, size in items]
    total = share * sum(sizes)
    found = water_level(torch.tensor(rates, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64), total)
    wanted = water_filled(rates, sizes, total)
    for rate, oracle, size in zip(found.tolist(), wanted, sizes, strict=True):
        assert 0 <= rate <= 1
        assert rate * size == pytest.approx(oracle * size, abs=1e-4), (found, wanted)
    assert sum(rate * size for rate, size in zip(found.tolist(), sizes, strict=True)) == pytest.approx(total, abs=1e-4)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 7)), min_size=1, max_size=20))
def test_the_largest_remainders_are_rounded_up_the_earlier_of_equals_first(items: list[tuple[int, int]]) -> None:
    items.append((3, -sum(eighths for _, eighths in items) % 8))  # makes the sum whole
    expected = [whole + eighths / 8 for whole, eighths in items]
    total = int(sum(expected))
    counts = [whole for whole, _ in items]
    by_remainder = sorted(range(len(items)), key=lambda index: (-items[index][1], index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    found = largest_remainder(torch.tensor(expected, dtype=torch.float64), total, decimals=6)
    assert found.tolist() == counts
    assert int(found.sum()) == total


def test_noise_of_the_last_bits_decides_no_remainder() -> None:
    expected = torch.tensor([1.5 - 1e-12, 2.5 + 1e-12, 3.0 - 1e-13], dtype=torch.float64)
    assert largest_remainder(expected, 7, decimals=6).tolist() == [2, 2, 3]


# -- the released code's floors


@given(shapes_and_rates(st.floats(0, 1)))
def test_floors_are_the_floors_of_plain_floats(case: tuple[Shapes, list[list[float]]]) -> None:
    shapes, values = case
    layout = in_pairs(shapes)
    rates = rates_of(layout, values)
    removed = [[math.floor(columns * rate) for rate in row] for row, (_, columns) in zip(values, shapes, strict=True)]
    kept = [
        [math.floor(columns * (1 - rate)) for rate in row] for row, (_, columns) in zip(values, shapes, strict=True)
    ]
    by_removed = floored_plan(layout, rates, floor_kept=False)
    by_kept = floored_plan(layout, rates, floor_kept=True)
    assert list(lists(by_removed).values()) == removed
    assert list(lists(by_kept).values()) == [
        [columns - count for count in row] for row, (_, columns) in zip(kept, shapes, strict=True)
    ]
    assert by_removed.lower_ties_first
    assert not by_kept.lower_ties_first
    by_removed.check(layout)
    by_kept.check(layout)


def test_the_two_floors_differ_by_one_weight_where_the_product_is_not_whole() -> None:
    layout = in_pairs([(2, 8)])
    rates = rates_of(layout, [[0.5, 0.6]])
    assert list(lists(floored_plan(layout, rates, floor_kept=False)).values()) == [[4, 4]]
    assert list(lists(floored_plan(layout, rates, floor_kept=True)).values()) == [[4, 5]]


# -- plans as values


def plan_of(counts: dict[Linear, list[int]]) -> Plan:
    return Plan({linear: torch.tensor(rows, dtype=torch.int32) for linear, rows in counts.items()})


LINEARS = st.builds(Linear, st.integers(0, 1), st.sampled_from(["a", "b"]))
COUNTS = st.dictionaries(LINEARS, st.lists(st.integers(0, 2), min_size=1, max_size=2), max_size=3)


@given(COUNTS, COUNTS)
def test_digests_are_equal_for_equal_plans_only(one: dict[Linear, list[int]], other: dict[Linear, list[int]]) -> None:
    assert (plan_of(one).digest == plan_of(other).digest) == (one == other)
    backwards = dict(reversed(one.items()))
    assert plan_of(one).digest == plan_of(backwards).digest


def test_counts_cannot_pass_for_a_name_in_the_digest() -> None:
    (count,) = struct.unpack("<i", b"1 b ")
    one = {Linear(0, "a"): [5, count, 7]}
    other = {Linear(0, "a"): [5], Linear(1, "b"): [7]}
    assert plan_of(one).digest != plan_of(other).digest


def test_the_tie_rule_is_part_of_the_plan() -> None:
    counts = {Linear(0, "a"): torch.tensor([1], dtype=torch.int32)}
    assert Plan(counts).digest != Plan(counts, lower_ties_first=False).digest


def test_the_total_is_the_sum_of_all_counts() -> None:
    assert plan_of({Linear(0, "a"): [1, 2], Linear(1, "a"): [3]}).total == 6


def test_a_plan_that_fits_its_model_passes() -> None:
    plan_of({Linear(0, "linear0"): [0, 4], Linear(0, "linear1"): [2]}).check(in_pairs([(2, 4), (1, 3)]))


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({Linear(0, "linear0"): [1, 1]}, "other linears"),
        ({Linear(0, "linear0"): [1, 1], Linear(0, "linear1"): [1], Linear(1, "linear0"): [1]}, "other linears"),
        ({Linear(0, "linear0"): [1, 1, 1], Linear(0, "linear1"): [1]}, "block 0 linear0.*3 rows, the model 2"),
        ({Linear(0, "linear0"): [1, -1], Linear(0, "linear1"): [1]}, r"block 0 linear0.*outside \[0, 4\]"),
        ({Linear(0, "linear0"): [1, 1], Linear(0, "linear1"): [4]}, r"block 0 linear1.*outside \[0, 3\]"),
    ],
    ids=["too few linears", "too many linears", "rows", "negative", "more than columns"],
)
def test_a_plan_for_another_model_is_refused(counts: dict[Linear, list[int]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(counts).check(in_pairs([(2, 4), (1, 3)]))


def test_a_plan_lays_its_counts_out_in_memory_whatever_strides_they_have() -> None:
    linear, other = Linear(0, "one"), Linear(0, "other")
    given = {linear: torch.tensor([3], dtype=torch.int32).expand(64), other: torch.arange(8, dtype=torch.int32)[::2]}
    plan = Plan(given)
    for name, counts in plan.removed.items():
        assert counts.is_contiguous(), (name, counts.stride())
        assert counts.tolist() == given[name].tolist()
    assert plan.total == 3 * 64 + 0 + 2 + 4 + 6


# -- zeros of the input


@st.composite
def with_zeros(draw: st.DrawFn) -> tuple[Shapes, list[list[float]], list[list[int]]]:
    shapes, rates = draw(shapes_and_rates(ANY_RATE))
    zeros = [draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)) for rows, columns in shapes]
    return shapes, rates, zeros


@given(with_zeros(), st.floats(0, 1))
def test_an_exact_plan_takes_at_least_the_zeros_of_each_row_and_stays_exact(
    case: tuple[Shapes, list[list[float]], list[list[int]]], more: float
) -> None:
    shapes, values, counts = case
    layout = in_pairs(shapes)
    zeros = {spec.linear: torch.tensor(rows, dtype=torch.int32) for spec, rows in zip(layout, counts, strict=True)}
    number = sum(map(sum, counts))
    target = (number + more * (layout.prunable - number)) / layout.prunable
    plan = exact_plan(layout, rates_of(layout, values), target=target, zeros=zeros)
    plan.check(layout)
    assert plan.total == round(target * layout.prunable)
    if plan.total >= number:
        for linear, rows in zeros.items():
            assert bool((plan.removed[linear] >= rows).all()), (plan.removed[linear].tolist(), rows.tolist())


def test_rows_with_fewer_zeros_than_they_lose_change_nothing() -> None:
    layout = in_pairs([(3, 20), (2, 30)])
    rates = rates_of(layout, [[0.5, 0.6, 0.7], [0.8, 0.4]])
    plan = exact_plan(layout, rates, target=0.6)
    same = exact_plan(layout, rates, target=0.6, zeros=plan.removed)
    fewer = {linear: counts - 1 for linear, counts in plan.removed.items()}
    assert plan.digest == same.digest == exact_plan(layout, rates, target=0.6, zeros=fewer).digest


def test_what_a_row_of_zeros_takes_is_given_back_by_the_others() -> None:
    layout = in_pairs([(4, 10), (4, 10)])
    rates = uniform_rates(layout, lambda _: 0.5)
    zeros = {spec.linear: torch.zeros(4, dtype=torch.int32) for spec in layout}
    zeros[next(iter(layout)).linear][1] = 10
    plan = exact_plan(layout, rates, target=0.5, zeros=zeros)
    first, second = lists(plan).values()
    assert (first, second) == ([4, 10, 3, 3], [5, 5, 5, 5])
