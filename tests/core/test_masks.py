"""A mask removes the lowest scores of each row, in the requested number, the lower column first among equals."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.kernels.masking import zero_lowest
from neuronal_ray.core.kernels.ranking import rank_dtype
from neuronal_ray.core.masks import lowest_mask, rank_rows

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 2.0, 0.5]),  # many ties
    st.floats(0, 100, width=16),
)
Rows = list[list[float]]


@st.composite
def score_rows(draw: st.DrawFn) -> Rows:
    columns = draw(st.integers(1, 12))
    return draw(st.lists(st.lists(SCORES, min_size=columns, max_size=columns), min_size=1, max_size=4))


def sorted_columns(row: list[float]) -> list[int]:
    """Return the order in which the row's weights are removed."""
    return sorted(range(len(row)), key=lambda column: (row[column], column))


@pytest.mark.parametrize("dtype", FLOATS)
@given(rows=score_rows())
def test_ranks_are_positions_in_a_stable_sort(rows: Rows, dtype: torch.dtype) -> None:
    score = torch.tensor(rows, dtype=dtype)
    ranks = rank_rows(score)
    assert ranks.dtype == torch.int16
    for row, row_ranks in zip(score.tolist(), ranks.tolist(), strict=True):
        assert [row_ranks[column] for column in sorted_columns(row)] == list(range(len(row))), (row, row_ranks)


@pytest.mark.parametrize("dtype", FLOATS)
@given(rows=score_rows(), data=st.data())
def test_a_mask_removes_the_lowest_of_each_row(rows: Rows, dtype: torch.dtype, data: st.DataObject) -> None:
    columns = len(rows[0])
    counts = data.draw(st.lists(st.integers(0, columns), min_size=len(rows), max_size=len(rows)))
    score = torch.tensor(rows, dtype=dtype)
    weight = score + 1  # no zeros of its own
    before = weight.clone()
    ranks, removed = rank_rows(score), torch.tensor(counts, dtype=torch.int32)
    mask, pruned = lowest_mask(ranks, removed), zero_lowest(weight, ranks, removed)
    for row, count, row_mask in zip(score.tolist(), counts, mask.tolist(), strict=True):
        gone = set(sorted_columns(row)[:count])
        assert row_mask == [column in gone for column in range(columns)], (row, count)
    assert mask.sum(dim=1).tolist() == counts
    assert pruned.dtype == dtype
    assert torch.equal(pruned, torch.where(mask, 0, weight).to(dtype))
    assert torch.equal(weight, before), "zero_lowest changed its argument"


@given(score_rows())
def test_a_mask_is_contained_in_every_larger_mask(rows: Rows) -> None:
    ranks = rank_rows(torch.tensor(rows))
    cuts = [lowest_mask(ranks, torch.full((len(rows),), count, dtype=torch.int32)) for count in range(len(rows[0]) + 1)]
    assert not cuts[0].any()
    assert cuts[-1].all()
    for shallow, deep in itertools.pairwise(cuts):
        assert (deep | ~shallow).all()
        assert (deep.sum(dim=1) - shallow.sum(dim=1)).tolist() == [1] * len(rows)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("columns", "integers"), [(32_768, torch.int16), (32_769, torch.int32)])
def test_the_widest_rows_of_16_bit_ranks_and_wider_ones_are_masked_right(
    columns: int, integers: torch.dtype, dtype: torch.dtype
) -> None:
    score = torch.rand(2, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    ranks = rank_rows(score)
    assert ranks.dtype == rank_dtype(columns) == integers
    for row, row_ranks in zip(score.tolist(), ranks.tolist(), strict=True):
        assert [row_ranks[column] for column in sorted_columns(row)] == list(range(columns))
    for counts in ([0, 1], [columns - 1, columns], [columns // 2, 32_767], [columns, 0]):
        mask = lowest_mask(ranks, torch.tensor(counts, dtype=torch.int32))
        assert mask.sum(dim=1).tolist() == counts
        pruned = zero_lowest(score + 1, ranks, torch.tensor(counts, dtype=torch.int32))
        assert (pruned == 0).sum(dim=1).tolist() == counts


@given(score_rows())
def test_ties_can_be_broken_the_other_way(rows: Rows) -> None:
    ranks = rank_rows(torch.tensor(rows), lower_ties_first=False)
    for row, row_ranks in zip(torch.tensor(rows).tolist(), ranks.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda column: (row[column], -column))
        assert [row_ranks[column] for column in order] == list(range(len(row))), (row, row_ranks)


def test_a_transposed_score_is_ranked_by_its_rows() -> None:
    score = torch.tensor([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]]).t()  # Conv1D's weights come as such a view
    assert rank_rows(score).tolist() == [[2, 1, 0], [0, 1, 2]]
