"""Patterns remove the same number from every group, and mixed ones meet the budget as nearly as documented."""

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Shapes, layout_of, water_filled
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.masking import zero_lowest
from neuronal_ray.core.kernels.ranking import rank_dtype
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.masks import lowest_mask
from neuronal_ray.core.pattern import (
    Pattern,
    check_pattern,
    parse_pattern,
    pattern_plan,
    pattern_target,
    rank_in_groups,
)
from neuronal_ray.core.plan import Plan, PlanError, Rates

SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, 2.0, math.inf]), st.floats(0, 100, width=16))  # many ties


def rates_by_block(layout: Layout, by_block: list[float]) -> Rates:
    return {spec.linear: torch.full((spec.rows,), by_block[spec.linear.block], dtype=torch.float64) for spec in layout}


def per_group(layout: Layout, plan: Plan, group: int) -> dict[Linear, int]:
    """Return how many weights of each group every row of a linear loses; fail if rows differ."""
    found = {}
    for spec in layout:
        counts = set(plan.removed[spec.linear].tolist())
        assert len(counts) == 1, (spec.linear, counts)
        number, rest = divmod(counts.pop() * group, spec.columns)
        assert rest == 0, spec.linear
        found[spec.linear] = number
    return found


# -- names


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", None),
        ("2:4", Pattern(2, 4)),
        ("4:8", Pattern(4, 8)),
        ("3:8", Pattern(3, 8)),
        ("1:2", Pattern(1, 2)),
        ("63:64", Pattern(63, 64)),
        ("n:8", Pattern(None, 8)),
        ("n:2", Pattern(None, 2)),
    ],
)
def test_a_pattern_is_read_from_its_name(text: str, pattern: Pattern | None) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    [
        *("", "2", "structured", "2/4", "2:4:8", "4:2", "4:4", "0:4", "1:0", "-1:4", "02:4", "2.0:4", "2:65", "n:128"),
        *("n:1", "N:8", "n:n", "2:n", "2:4 ", "2:4\n", "\u00b2:4"),
    ],
)
def test_an_invalid_pattern_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(BadInput, match=r"^--pattern: .* is not a pattern, expected unstructured, N:M ") as error:
        parse_pattern(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "target"), [(Pattern(2, 4), 0.5), (Pattern(3, 8), 0.625), (Pattern(1, 64), 63 / 64)]
)
def test_a_fixed_pattern_has_a_sparsity(pattern: Pattern, target: float) -> None:
    assert pattern_target(pattern) == target


def test_a_linear_that_does_not_divide_is_named() -> None:
    layout = layout_of([[(2, 16), (3, 16)], [(2, 16), (5, 12)]])
    check_pattern({spec.linear: spec.columns for spec in layout}, Pattern(2, 4))
    with pytest.raises(PlanError, match=r"^--pattern: block 1 linear1 has 12 inputs, expected a multiple of 8$"):
        check_pattern({spec.linear: spec.columns for spec in layout}, Pattern(None, 8))
    with pytest.raises(PlanError, match="block 1 linear1"):
        pattern_plan(layout, rates_by_block(layout, [0.5, 0.5]), target=0.5, pattern=Pattern(4, 8))


# -- rankings


@st.composite
def grouped_scores(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    group, groups, rows = draw(st.integers(1, 8)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    row = st.lists(SCORES, min_size=group * groups, max_size=group * groups)
    return draw(st.lists(row, min_size=rows, max_size=rows)), group


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lower_ties_first", [True, False])
@given(case=grouped_scores())
def test_a_mask_removes_the_lowest_of_every_group(
    case: tuple[list[list[float]], int], dtype: torch.dtype, lower_ties_first: bool
) -> None:
    rows, group = case
    score = torch.tensor(rows, dtype=dtype)
    columns = score.shape[1]
    ranks = rank_in_groups(score, group, lower_ties_first=lower_ties_first)
    assert ranks.dtype == torch.int16
    for row_ranks in ranks.tolist():
        assert sorted(row_ranks) == list(range(columns)), row_ranks
    for number in range(group + 1):
        mask = lowest_mask(ranks, torch.full((len(rows),), number * columns // group, dtype=torch.int32))
        for row, row_mask in zip(score.tolist(), mask.tolist(), strict=True):
            for start in range(0, columns, group):
                sign = 1 if lower_ties_first else -1
                order = sorted(range(start, start + group), key=lambda column: (row[column], sign * column))
                expected = [column in order[:number] for column in range(start, start + group)]
                assert row_mask[start : start + group] == expected, (row, number, start)


def test_a_count_between_two_whole_ones_removes_from_the_first_groups_first() -> None:
    ranks = rank_in_groups(torch.tensor([[3.0, 1.0, 2.0, 4.0, 6.0, 5.0]]), 2)
    assert ranks.tolist() == [[3, 0, 1, 4, 5, 2]]


def test_the_score_is_left_alone_and_may_be_a_view() -> None:
    score = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0], [0.0, 9.0]])
    before = score.clone()
    assert rank_in_groups(score.t(), 2).tolist() == [[2, 0, 3, 1], [0, 2, 1, 3]]
    assert torch.equal(score, before)


@pytest.mark.parametrize("columns", [32_768, 32_776])
def test_ranks_are_as_wide_as_those_of_rows(columns: int) -> None:
    score = torch.rand(1, columns, generator=torch.Generator().manual_seed(0))
    ranks = rank_in_groups(score, 8)
    assert ranks.dtype == rank_dtype(columns)
    assert torch.equal(ranks.sort(dim=1).values[0].int(), torch.arange(columns, dtype=torch.int32))


def round_trip(weight: torch.Tensor) -> torch.Tensor:
    """Convert to torch's compressed form of 2:4 matrices, which has two values of every four, and back."""
    return sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_2_of_4_is_what_torch_calls_semi_structured(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(32, 64, generator=generator) + 5).to(dtype)  # no zeros of its own
    score = torch.rand(32, 64, generator=generator)
    half = torch.full((32,), 32, dtype=torch.int32)
    pruned = zero_lowest(weight, rank_in_groups(score, 4), half)
    assert int((pruned != 0).sum()) == 32 * 32
    assert torch.equal(round_trip(pruned), pruned)
    elsewhere = zero_lowest(weight, rank_in_groups(score, 8), half)
    assert not torch.equal(round_trip(elsewhere), elsewhere), "4:8 fits into 2:4: the check checks nothing"


# -- fixed plans


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(3, 8), Pattern(1, 8)])
def test_a_fixed_pattern_removes_the_same_everywhere_whatever_the_rates(pattern: Pattern) -> None:
    layout = layout_of([[(2, 16), (3, 8)], [(5, 24)]])
    plan = pattern_plan(layout, rates_by_block(layout, [0.1, 0.9]), target=0.123, pattern=pattern)
    plan.check(layout)
    assert set(per_group(layout, plan, pattern.group).values()) == {pattern.group - pattern.kept}
    assert all(counts.dtype == torch.int32 for counts in plan.removed.values())
    assert plan.total == pattern_target(pattern) * layout.prunable


# -- mixed plans

MIXED = Pattern(None, 8)


@st.composite
def mixed_cases(draw: st.DrawFn) -> tuple[Shapes, list[float], float]:
    shape = st.tuples(st.integers(1, 6), st.sampled_from([8, 16, 24]))
    blocks = draw(st.lists(st.lists(shape, min_size=1, max_size=3), min_size=1, max_size=4))
    rates = draw(st.lists(st.floats(-0.5, 1.5), min_size=len(blocks), max_size=len(blocks)))
    return blocks, rates, draw(st.one_of(st.floats(0, 1), st.integers(0, 8).map(lambda number: number / 8)))


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """Each block's n before single linears are raised, the total afterwards, and the order of blocks for raising."""

    numbers: list[int]
    total: int
    order: list[int]


def literal(blocks: Shapes, rates: list[float], target: float) -> Rounded:
    """Follow the docstring step by step, trying every set of linears."""
    steps = [[rows * columns // 8 for rows, columns in shapes] for shapes in blocks]
    sizes = [8 * sum(of_block) for of_block in steps]
    budget = round(target * sum(sizes))
    wanted = [round(8 * rate, 6) for rate in water_filled(rates, sizes, budget)]
    numbers = [math.floor(number) for number in wanted]
    missing = budget - sum(number * sum(of_block) for number, of_block in zip(numbers, steps, strict=True))
    up, down = [], []
    for block in sorted(range(len(blocks)), key=lambda block: (-round(wanted[block] - numbers[block], 6), block)):
        if numbers[block] < 8 and sum(steps[block]) <= missing:
            numbers[block] += 1
            missing -= sum(steps[block])
            up.append(block)
        else:
            down.append(block)
    spare = [step for number, of_block in zip(numbers, steps, strict=True) if number < 8 for step in of_block]
    sums = {sum(chosen) for count in range(len(spare) + 1) for chosen in itertools.combinations(spare, count)}
    nearest = min(sums, key=lambda total: (abs(total - missing), total))
    return Rounded(numbers=numbers, total=budget - missing + nearest, order=down + up)


@settings(max_examples=150, deadline=None)
@given(case=mixed_cases())
def test_a_mixed_plan_is_what_its_rule_says(case: tuple[Shapes, list[float], float]) -> None:
    blocks, rates, target = case
    layout = layout_of(blocks)
    plan = pattern_plan(layout, rates_by_block(layout, rates), target=target, pattern=MIXED)
    plan.check(layout)
    found = per_group(layout, plan, 8)
    expected = literal(blocks, rates, target)
    assert plan.total == expected.total, (found, expected)
    raised = {linear: number - expected.numbers[linear.block] for linear, number in found.items()}
    for step in {spec.size for spec in layout}:  # of one size: a run of raised ones, then the others
        alike = [
            raised[spec.linear]
            for block in expected.order
            for spec in layout.blocks[block]
            if spec.size == step and expected.numbers[block] < 8
        ]
        assert alike == sorted(alike, reverse=True), (found, expected)
    assert set(raised.values()) <= {0, 1}, (found, expected)
    largest = max(spec.size for spec in layout) // 8
    assert abs(plan.total - round(target * layout.prunable)) <= largest / 2, (found, expected)


MODEL = [[(64, 64), (16, 64), (16, 64), (64, 64), (104, 64), (104, 64), (64, 104)]] * 6
"""A LLaMA of six blocks; per n its linears lose 512, 128, 128, 512, 832, 832 and 832 weights."""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.floats(0, 1))
def test_the_budget_is_missed_by_at_most_half_a_step_of_the_smallest_linear(rates: list[float], target: float) -> None:
    layout = layout_of(MODEL)
    plan = pattern_plan(layout, rates_by_block(layout, rates), target=target, pattern=MIXED)
    assert abs(plan.total - round(target * layout.prunable)) <= 16 * 64 // 8 / 2


@given(st.integers(0, 8), st.lists(st.integers(0, 8), min_size=6, max_size=6))
def test_whole_rates_are_kept_as_they_are(number: int, numbers: list[int]) -> None:
    layout = layout_of(MODEL)
    uniform = pattern_plan(layout, rates_by_block(layout, [number / 8] * 6), target=number / 8, pattern=MIXED)
    assert set(per_group(layout, uniform, 8).values()) == {number}
    target = sum(numbers) / 48
    plan = pattern_plan(layout, rates_by_block(layout, [n / 8 for n in numbers]), target=target, pattern=MIXED)
    assert plan.total == round(target * layout.prunable)
    assert {linear: numbers[linear.block] for linear in plan.removed} == per_group(layout, plan, 8)


def test_a_budget_that_linears_can_make_up_is_met_exactly() -> None:
    layout = layout_of(MODEL)
    target = 0.5 + (3 * 832 + 512 + 128) / layout.prunable  # all but one of the linears of a block, the largest first
    plan = pattern_plan(layout, rates_by_block(layout, [target] * 6), target=target, pattern=MIXED)
    assert plan.total == round(target * layout.prunable)
    raised = {linear for linear, number in per_group(layout, plan, 8).items() if number == 5}
    assert raised == {Linear(0, f"linear{index}") for index in (0, 1, 4, 5, 6)}


def test_deeper_blocks_with_higher_rates_lose_more() -> None:
    layout = layout_of(MODEL)
    rates = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75]
    plan = pattern_plan(layout, rates_by_block(layout, rates), target=0.625, pattern=MIXED)
    found = per_group(layout, plan, 8)
    assert [found[Linear(block, "linear4")] for block in range(6)] == [4, 4, 5, 5, 6, 6]
    assert plan.total == round(0.625 * layout.prunable)


def test_linears_of_a_block_with_different_rates_get_different_numbers() -> None:
    layout = layout_of(MODEL)
    asked = [3, 6, 5, 3, 4, 7, 1]
    rates = {
        spec.linear: torch.full((spec.rows,), asked[index % 7] / 8, dtype=torch.float64)
        for index, spec in enumerate(layout)
    }
    target = sum(asked[index % 7] / 8 * spec.size for index, spec in enumerate(layout)) / layout.prunable
    found = per_group(layout, pattern_plan(layout, rates, target=target, pattern=MIXED), 8)
    assert [found[spec.linear] for spec in layout] == asked * 6


def test_rates_that_differ_by_less_than_nine_decimals_are_one() -> None:
    layout = layout_of([[(4, 16), (4, 16)], [(4, 16), (4, 16)]])
    noise = [0.0, 1e-12, 2e-12, 0.0]
    rates = {
        spec.linear: torch.full((spec.rows,), 0.6 + more, dtype=torch.float64)
        for spec, more in zip(layout, noise, strict=True)
    }
    found = per_group(layout, pattern_plan(layout, rates, target=4.5 / 8, pattern=MIXED), 8)
    assert list(found.values()) == [5, 5, 4, 4]  # whole blocks: the earlier one up


def test_row_rates_count_by_their_mean() -> None:
    layout = layout_of([[(4, 16)], [(4, 16)]])
    rows = {
        Linear(0, "linear0"): torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64),
        Linear(1, "linear0"): torch.full((4,), 0.75, dtype=torch.float64),
    }
    plan = pattern_plan(layout, rows, target=0.625, pattern=MIXED)
    assert per_group(layout, plan, 8) == {Linear(0, "linear0"): 4, Linear(1, "linear0"): 6}
