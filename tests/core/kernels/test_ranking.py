"""The ranking equals the positions of a stable sort, for any scores."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.kernels import ranking
from neuronal_ray.core.kernels.ranking import rank, rank_reference

SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf]), st.floats(width=32, allow_nan=False))


@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(SCORES, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_scores_of_any_sign_are_ranked_as_a_stable_sort_does(rows: list[list[float]]) -> None:
    score = torch.tensor(rows)
    assert torch.equal(rank(score), rank_reference(score))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 2**15), (2, 2**15 + 1), (129, 700)])
def test_many_ties_in_odd_shapes(dtype: torch.dtype, rows: int, columns: int) -> None:
    score = torch.randint(0, 50, (rows, columns), generator=torch.Generator().manual_seed(0)).to(dtype) / 7
    assert torch.equal(rank(score), rank_reference(score))


def test_nan_comes_last() -> None:
    score = torch.tensor([[math.nan, 1.0, -math.nan, math.inf, 0.0]])
    assert rank(score).tolist() == rank_reference(score).tolist() == [[3, 1, 4, 2, 0]]


def test_slices_and_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    score = torch.rand(50, 30, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(ranking, "SLICES", {"cpu": 200})
    monkeypatch.setattr(ranking, "_THREAD_SCORES", 70)
    assert torch.equal(rank(score), rank_reference(score))
    assert torch.equal(rank(score.double()), rank_reference(score.double()))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_ranks_as_the_cpu_does(dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (33, 4096), (5, 2**15 + 1)):
        score = torch.rand(rows, columns, generator=torch.Generator().manual_seed(2)).to(dtype)
        assert torch.equal(rank(score.to("cuda")).cpu(), rank_reference(score)), (rows, columns)
