"""Cells are neighboring linears of one kind, and directions follow their formulas for any divergences."""

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core import directions
from neuronal_ray.core.directions import Cells, coarse_direction, fine_direction
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec

KINDS = (
    ("attention", "attention.query"),
    ("attention", "attention.output"),
    ("mlp", "mlp.gate"),
    ("mlp", "mlp.experts.{}.up"),
    ("mlp", "mlp.experts.{}.down"),
)
"""Sub-block and path of each kind; there are two experts."""

GAINS = st.one_of(
    st.floats(1e-9, 1e3),
    st.floats(-1.0, 1.0, allow_subnormal=False),
    st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf]),
)
STRANGE = st.sampled_from([math.nan, math.inf, -math.inf])


def spec_of(block: int, part: str, path: str, rows: int, columns: int) -> LinearSpec:
    return LinearSpec(
        linear=Linear(block, path),
        rows=rows,
        columns=columns,
        reads=Group(block, 0),
        consumer=None,
        sources=None,
        sub_block=part,
    )


def layout_of(blocks: Sequence[Sequence[int]], size: int = 7) -> Layout:
    """Return blocks with some of KINDS, in linears of several sizes."""
    specs = []
    for block, kinds in enumerate(blocks):
        for number in kinds:
            part, path = KINDS[number]
            for expert in range(2 if "{}" in path else 1):
                rows = 1 + (3 * number + block + size) % 5
                specs.append(spec_of(block, part, path.format(expert), rows, 1 + (number + size) % 4))
    return Layout(tuple(specs))


EVEN = layout_of([range(len(KINDS))] * 6)


SUBSETS = st.lists(st.integers(0, len(KINDS) - 1), min_size=1, max_size=len(KINDS), unique=True)
LAYOUTS = st.builds(
    lambda first, others, number, size: ([first, *[others] * number], size),
    SUBSETS,
    SUBSETS,
    st.integers(0, 8),
    st.integers(0, 20),
)
"""Arguments of `layout_of`: the first block may lack kinds that others have, or have others."""
CELLS = st.tuples(LAYOUTS, st.integers(-3, 50), st.booleans(), st.booleans())
"""Arguments of `cells_of`."""
MOST_CELLS = 9 * len(KINDS)

LayoutOf = tuple[list[list[int]], int]
CellsOf = tuple[LayoutOf, int, bool, bool]


def cells_of(arguments: CellsOf) -> Cells:
    layout, most, blocks, parts = arguments
    return Cells.of(layout_of(*layout), most=most, blocks=blocks, parts=parts)


def column(gains: Sequence[float], cells: Cells) -> torch.Tensor:
    """Return one of `gains` for each cell."""
    return torch.tensor(gains[: cells.count], dtype=torch.float64)


def gains_of(values: st.SearchStrategy[float] = GAINS) -> st.SearchStrategy[list[float]]:
    """One per cell, and more than there are."""
    return st.lists(values, min_size=MOST_CELLS, max_size=MOST_CELLS)


def kind_of(path: str) -> str:
    """Return the path without an expert's number."""
    return path.replace("experts.0.", "experts.").replace("experts.1.", "experts.")


# cells


@given(LAYOUTS, st.integers(-3, 50), st.booleans(), st.booleans())
def test_a_cell_is_one_kind_in_a_run_of_neighboring_blocks(
    shape: LayoutOf, most: int, blocks: bool, parts: bool
) -> None:
    layout = layout_of(*shape)
    cells = Cells.of(layout, most=most, blocks=blocks, parts=parts)
    members = cells.members(layout)
    assert len(members) == cells.count
    assert sorted(linear for cell in members for linear in cell) == sorted(spec.linear for spec in layout)
    num_kinds = len({kind_of(spec.linear.path) for spec in layout}) if parts else 1
    assert cells.count <= max(most, num_kinds), (cells.count, most, num_kinds)
    blocks_of: dict[str, list[int]] = {}
    for spec in layout:
        known = blocks_of.setdefault(kind_of(spec.linear.path) if parts else "", [])
        known.extend([spec.linear.block] * (spec.linear.block not in known))
    for cell in members:
        names = {kind_of(linear.path) if parts else "" for linear in cell}
        assert len(names) == 1, cell
        there = blocks_of[names.pop()]
        run = sorted({there.index(linear.block) for linear in cell})
        assert run == list(range(run[0], run[-1] + 1)), (cell, there)
        assert blocks or len(run) == len(there), "all blocks are alike"


@given(LAYOUTS, st.integers(-3, 50), st.booleans(), st.booleans())
def test_cells_are_those_of_as_many_runs_as_the_number_allows(
    shape: LayoutOf, most: int, blocks: bool, parts: bool
) -> None:
    layout = layout_of(*shape)
    cells = Cells.of(layout, most=most, blocks=blocks, parts=parts)
    kinds = list(dict.fromkeys(kind_of(spec.linear.path) if parts else "" for spec in layout))
    names = list(dict.fromkeys(spec.sub_block if parts else "" for spec in layout))
    runs = 1
    while blocks and runs < layout.num_blocks and (runs + 1) * len(kinds) <= most:
        runs += 1
    numbers: dict[tuple[int, int], int] = {}
    for index, spec in enumerate(layout):
        run = math.floor(spec.linear.block * runs / layout.num_blocks)
        kind = kinds.index(kind_of(spec.linear.path) if parts else "")
        assert int(cells.kind[index]) == kind
        assert int(cells.cell[index]) == numbers.setdefault((kind, run), len(numbers))
        assert int(cells.sub_block[index]) == names.index(spec.sub_block if parts else "") + len(names) * run
        assert float(cells.sizes[index]) == spec.rows * spec.columns
    assert cells.count == len(numbers)


@pytest.mark.parametrize(("most", "lengths"), [(4, [6]), (8, [3, 3]), (16, [1, 2, 1, 2]), (24, [1] * 6), (99, [1] * 6)])
def test_more_cells_are_shorter_runs(most: int, lengths: list[int]) -> None:
    layout = layout_of([(0, 1, 2, 4)] * 6)
    cells = Cells.of(layout, most=most)
    first = [sorted({linear.block for linear in cell}) for cell in cells.members(layout) if "query" in cell[0].path]
    assert sorted(len(run) for run in first) == sorted(lengths)
    assert [block for run in first for block in run] == list(range(6))
    assert cells.count == 4 * len(lengths)


@given(LAYOUTS, st.booleans(), st.booleans())
def test_the_depth_is_hat_functions_over_the_blocks(shape: LayoutOf, blocks: bool, parts: bool) -> None:
    layout = layout_of(*shape)
    cells = Cells.of(layout, most=10, blocks=blocks, parts=parts)
    knots = min(layout.num_blocks, 4) if blocks else 1
    assert cells.depth.shape == (len(layout.specs), knots)
    for index, spec in enumerate(layout):
        for knot in range(knots):
            hat = 0.0
            if knots > 1:
                width = (layout.num_blocks - 1) / (knots - 1)
                hat = max(0.0, 1 - abs(spec.linear.block - knot * width) / width)
            assert float(cells.depth[index, knot]) == pytest.approx(hat, abs=1e-12), (spec.linear, knot)
        assert knots == 1 or float(cells.depth[index].sum()) == pytest.approx(1)


@given(LAYOUTS, st.booleans(), st.booleans())
def test_axes_are_the_kinds_then_the_knots_where_there_are_several(shape: LayoutOf, blocks: bool, parts: bool) -> None:
    layout = layout_of(*shape)
    cells = Cells.of(layout, most=10, blocks=blocks, parts=parts)
    kinds = list(dict.fromkeys(kind_of(spec.linear.path) for spec in layout)) if parts else [""]
    wanted = []
    if len(kinds) > 1:
        wanted += [[float(kind_of(spec.linear.path) == kind) for spec in layout] for kind in kinds]
    if blocks and layout.num_blocks > 1:
        wanted += [cells.depth[:, knot].tolist() for knot in range(min(layout.num_blocks, 4))]
    assert cells.axes.dtype == torch.float64
    assert cells.axes.shape == (len(wanted), len(layout.specs))
    assert cells.axes.tolist() == wanted


# the fine direction


def literal_fine(cells: Cells, gains: Sequence[float], pooled: float) -> list[float]:
    """As documented, linear by linear."""
    finite = [gain for gain in gains if math.isfinite(gain)]
    replaced = [0.0 if math.isnan(gain) else max(finite, default=0.0) if gain == math.inf else gain for gain in gains]
    positive = [gain for gain in replaced if gain > 0]
    if not positive:
        return [0.0] * len(cells.sizes)
    median = statistics.median_low(positive)
    of_cell = [math.log(max(gain, directions._LEAST_GAIN * median) / median) for gain in replaced]
    logs = [of_cell[cell] for cell in cells.cell.tolist()]

    def means(values: list[float], groups: list[int]) -> list[float]:
        return [
            statistics.fmean(value for value, other in zip(values, groups, strict=True) if other == group)
            for group in groups
        ]

    by_kind = means(logs, cells.kind.tolist())
    rest = means([log - mean for log, mean in zip(logs, by_kind, strict=True)], cells.sub_block.tolist())
    mixed = [(1 - pooled) * log + pooled * (kind + part) for log, kind, part in zip(logs, by_kind, rest, strict=True)]
    sizes = cells.sizes.tolist()
    mean = sum(log * size for log, size in zip(mixed, sizes, strict=True)) / sum(sizes)
    centered = [log - mean for log in mixed]
    scale = statistics.fmean(abs(log) for log in centered)
    if scale == 0:
        return [0.0] * len(sizes)
    bound = directions._LARGEST_MOVE
    return [-max(-bound, min(bound, log / scale)) / bound for log in centered]


@given(CELLS, gains_of(), st.sampled_from([0.0, 0.5]))
def test_the_fine_direction_is_its_formula(shape: CellsOf, gains: list[float], pooled: float) -> None:
    cells = cells_of(shape)
    found = fine_direction(cells, column(gains, cells), pooled=pooled)
    assert found.dtype == torch.float64
    assert found.shape == cells.sizes.shape
    assert found.tolist() == pytest.approx(literal_fine(cells, gains[: cells.count], pooled), rel=1e-6, abs=1e-6)


@given(CELLS, gains_of(), st.floats(0, 1))
def test_fine_moves_are_between_minus_1_and_1(shape: CellsOf, gains: list[float], pooled: float) -> None:
    cells = cells_of(shape)
    found = fine_direction(cells, column(gains, cells), pooled=pooled)
    assert bool((found.abs() <= 1).all()), found  # NaN fails, too


@given(CELLS, gains_of(st.sampled_from([0.0, -1.0, math.nan, math.inf, -math.inf])), st.sampled_from([0.0, 0.5]))
def test_without_a_positive_finite_gain_nothing_moves(shape: CellsOf, gains: list[float], pooled: float) -> None:
    cells = cells_of(shape)
    assert not fine_direction(cells, column(gains, cells), pooled=pooled).any()


@given(CELLS, st.floats(1e-12, 1e6), st.sampled_from([0.0, 0.5]))
def test_equal_gains_move_nothing(shape: CellsOf, gain: float, pooled: float) -> None:
    cells = cells_of(shape)
    assert not fine_direction(cells, column([gain] * cells.count, cells), pooled=pooled).any()


@given(CELLS, gains_of(st.integers(1, 20).map(float)), st.sampled_from([1e-9, 0.25, 1e6]))
def test_the_unit_of_the_gains_does_not_matter(shape: CellsOf, gains: list[float], unit: float) -> None:
    cells = cells_of(shape)
    scaled = [gain * unit for gain in gains]
    ours, theirs = (fine_direction(cells, column(values, cells)) for values in (gains, scaled))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@given(CELLS, gains_of(st.integers(1, 200).map(float)))
def test_the_more_a_cell_gains_the_lower_its_rate_goes(shape: CellsOf, gains: list[float]) -> None:
    cells = cells_of(shape)
    gains = gains[: cells.count]
    moves = fine_direction(cells, column(gains, cells)).tolist()
    of_linear = [gains[cell] for cell in cells.cell.tolist()]
    ordered = sorted(zip(of_linear, moves, strict=True), key=lambda pair: pair[0])
    assert all(less >= more for (_, less), (_, more) in pairwise(ordered)), ordered
    if len(set(gains)) > 1:
        assert min(moves) < 0 < max(moves), ordered
        assert moves[of_linear.index(max(gains))] == min(moves)


def test_moves_within_the_bound_take_as_many_weights_as_they_give_back() -> None:
    cells = Cells.of(EVEN, most=MOST_CELLS)
    moves = fine_direction(cells, column([1.0, 3.0] * cells.count, cells))
    assert float(moves.abs().max()) < 1
    assert float((moves * cells.sizes).sum()) == pytest.approx(0, abs=1e-9)
    assert float(moves.abs().mean()) == pytest.approx(1 / directions._LARGEST_MOVE)


@given(CELLS, gains_of(st.floats(0.5, 2.0)), st.integers(0, MOST_CELLS), STRANGE)
def test_a_gain_that_is_no_number_is_the_largest_or_the_least_of_all(
    shape: CellsOf, gains: list[float], position: int, value: float
) -> None:
    cells = cells_of(shape)
    gains, position = gains[: cells.count], position % cells.count
    stand_in = max([gain for index, gain in enumerate(gains) if index != position], default=0.0)
    strange, known = gains.copy(), gains.copy()
    strange[position], known[position] = value, stand_in if value == math.inf else -1.0
    for pooled in (0.0, 0.5):
        found = fine_direction(cells, column(strange, cells), pooled=pooled)
        assert bool(found.isfinite().all()), found
        assert torch.equal(found, fine_direction(cells, column(known, cells), pooled=pooled))


def test_gains_that_kind_and_sub_block_explain_are_pooled_without_loss() -> None:
    cells = Cells.of(EVEN, most=MOST_CELLS)
    by_cell = {
        cell: math.exp(0.3 * kind + 0.2 * (part // 2))
        for cell, kind, part in zip(cells.cell.tolist(), cells.kind.tolist(), cells.sub_block.tolist(), strict=True)
    }
    gains = column([by_cell[cell] for cell in range(cells.count)], cells)
    alone, pooled = (fine_direction(cells, gains, pooled=share) for share in (0.0, 0.5))
    torch.testing.assert_close(alone, pooled, rtol=1e-9, atol=1e-9)
    gains[7] *= 1.5
    alone, pooled = (fine_direction(cells, gains, pooled=share) for share in (0.0, 0.5))
    assert not torch.allclose(alone, pooled, rtol=1e-2, atol=1e-2)


# the coarse direction

KLS = st.one_of(st.floats(1e-6, 1e3), st.just(math.inf))
EXACT = st.sampled_from([0.0, 5e-324, 1e-300])


def literal_coarse(
    axes: list[list[float]], here: float, ups: Sequence[float], downs: Sequence[float], step: float, largest: float
) -> list[float]:
    """Return the vertex of the parabola through ln KL at -step, 0 and step on every axis."""
    slopes, curvatures = [], []
    for up, down in zip(ups, downs, strict=True):
        slopes.append((math.log(up) - math.log(down)) / (2 * step))
        curvatures.append((math.log(up) - 2 * math.log(here) + math.log(down)) / step**2)
    sizes = [0.0 if curvature == math.inf else abs(curvature) for curvature in curvatures]
    least = directions._LEAST_CURVATURE * statistics.median_low(sizes) + 1e-6 if sizes else 0.0
    moves = []
    for slope, curvature in zip(slopes, curvatures, strict=True):
        vertex = -slope / max(curvature, least) if math.isfinite(curvature) else 0.0
        moves.append(max(-largest, min(largest, vertex)))
    return [
        sum(move * axis[linear] for move, axis in zip(moves, axes, strict=True)) for linear in range(len(EVEN.specs))
    ]


NUM_AXES = len(Cells.of(EVEN, most=1).axes)


def values_of(values: st.SearchStrategy[float]) -> st.SearchStrategy[list[float]]:
    return st.lists(values, min_size=NUM_AXES, max_size=NUM_AXES)


@given(
    st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    st.floats(1e-6, 1e3),
    values_of(KLS),
    values_of(KLS),
    st.sampled_from([(0.015, 0.16), (0.06, 0.05)]),
)
def test_the_coarse_direction_is_its_formula(
    kept: tuple[bool, bool], here: float, ups: list[float], downs: list[float], lengths: tuple[float, float]
) -> None:
    cells = Cells.of(EVEN, most=10, blocks=kept[0], parts=kept[1])
    step, largest = lengths
    ups, downs = ups[: len(cells.axes)], downs[: len(cells.axes)]
    found = coarse_direction(cells, here, ups, downs, step=step, largest=largest)
    assert found.dtype == torch.float64
    wanted = literal_coarse(cells.axes.tolist(), here, ups, downs, step, largest)
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@given(st.floats(1e-6, 1e3), values_of(KLS), values_of(KLS))
def test_coarse_moves_are_finite_and_within_their_bound(here: float, ups: list[float], downs: list[float]) -> None:
    assert_bounded(here, ups, downs)


@given(st.floats(1e-6, 1e3), values_of(st.one_of(KLS, EXACT)), values_of(st.one_of(KLS, EXACT)))
def test_a_divergence_of_0_is_no_error(here: float, ups: list[float], downs: list[float]) -> None:
    """For example of weights with dead inputs, or that were zero before."""
    assert_bounded(here, ups, downs)


def assert_bounded(here: float, ups: list[float], downs: list[float]) -> None:
    cells = Cells.of(EVEN, most=10)
    found = coarse_direction(cells, here, ups, downs, step=0.06, largest=0.16)
    bounds = 0.16 * cells.axes.sum(dim=0)  # [axes, linears] -> [linears]
    assert found.shape == bounds.shape
    assert bool((found.abs() <= bounds + 1e-12).all()), found


@pytest.mark.parametrize("vertex", [-0.1, -0.02, 0.0, 0.05, 0.15])
def test_a_parabola_of_ln_kl_is_gone_down_to_its_vertex(vertex: float) -> None:
    cells = Cells.of(EVEN, most=10, parts=False)

    def kl(move: float) -> float:
        return math.exp(20 * (move - vertex) ** 2 - 3)

    size = len(cells.axes)
    found = coarse_direction(cells, kl(0), [kl(0.06)] * size, [kl(-0.06)] * size, step=0.06, largest=0.16)
    assert found.tolist() == pytest.approx([vertex] * len(EVEN.specs), abs=1e-9)  # hats add up to 1


def test_one_axis_moves_its_own_linears_only() -> None:
    cells = Cells.of(EVEN, most=10, blocks=False)
    ups, downs = [1.0] * len(cells.axes), [1.0] * len(cells.axes)
    ups[2], downs[2] = 0.5, 2.5
    found = coarse_direction(cells, 1.0, ups, downs, step=0.06, largest=0.16)
    kind = cells.kind == 2
    assert found[kind].tolist() == [0.16] * int(kind.sum()), "less is better where there is more sparsity"
    assert not found[~kind].any()


def test_without_curvature_the_step_is_to_the_bound() -> None:
    cells = Cells.of(EVEN, most=10, blocks=False)
    size = len(cells.axes)
    found = coarse_direction(cells, 1.0, [math.exp(0.1)] * size, [math.exp(-0.1)] * size, step=0.06, largest=0.16)
    assert found.tolist() == [-0.16] * len(EVEN.specs)


def test_a_negative_curvature_counts_as_a_part_of_the_median() -> None:
    cells = Cells.of(EVEN, most=10, blocks=False)
    size = len(cells.axes)
    found = coarse_direction(cells, 1.0, [math.exp(-0.1)] * size, [math.exp(-0.3)] * size, step=0.1, largest=0.16)
    curvature = 0.4 / 0.1**2 * directions._LEAST_CURVATURE
    assert found.tolist() == pytest.approx([-1 / curvature] * len(EVEN.specs), rel=1e-6)
    assert 1 / curvature < 0.16


def test_without_axes_there_is_no_coarse_direction() -> None:
    cells = Cells.of(EVEN, most=10, blocks=False, parts=False)
    assert len(cells.axes) == 0
    found = coarse_direction(cells, 1.0, [], [], step=0.06, largest=0.16)
    assert found.tolist() == [0.0] * len(EVEN.specs)
    assert found.dtype == torch.float64
