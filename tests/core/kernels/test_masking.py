"""Masking a weight equals its definition for odd shapes, all dtypes and any strides."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.kernels import build, masking
from neuronal_ray.core.kernels.masking import zero_lowest, zero_lowest_reference
from neuronal_ray.core.kernels.ranking import rank

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture(params=["C", "torch"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with the C kernel and without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(masking, "passes", lambda: None)
        elif build.passes() is None:
            pytest.skip("no compiler")
        yield request.param


def case(rows: int, columns: int, dtype: torch.dtype, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights of both signs with zeros of both signs among them, their ranking, counts from none to all."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=source).to(dtype)
    weight[torch.rand(rows, columns, generator=source) < 0.1] *= 0
    removed = torch.randint(0, columns + 1, (rows,), generator=source, dtype=torch.int32)
    return weight, rank(weight.abs()), removed


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))
def test_masking_is_the_product_with_the_mask(dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    weight, ranks, removed = case(rows, columns, dtype, seed)
    before = weight.clone()
    assert torch.equal(zero_lowest(weight, ranks, removed), zero_lowest_reference(weight, ranks, removed))
    assert torch.equal(weight, before), "zero_lowest changed its argument"


@pytest.mark.parametrize("dtype", DTYPES)
def test_given_memory_is_overwritten_and_returned(dtype: torch.dtype) -> None:
    weight, ranks, removed = case(7, 33, dtype, 0)
    out = torch.full_like(weight, torch.nan)
    assert zero_lowest(weight, ranks, removed, out=out) is out
    assert torch.equal(out, zero_lowest_reference(weight, ranks, removed))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_transposed_weight_is_masked_with_its_own_strides(dtype: torch.dtype) -> None:
    weight, ranks, removed = case(6, 40, dtype, 1)
    stored = weight.t().contiguous().t()
    found = zero_lowest(stored, ranks, removed)
    assert torch.equal(found, zero_lowest_reference(weight, ranks, removed))
    assert found.stride() == stored.stride()


@pytest.mark.parametrize("dtype", DTYPES)
def test_counts_of_any_strides_are_read_row_by_row(
    dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, ranks, counts = case(64, 40, dtype, 5)
    one_for_all, every_other = counts[:1].expand(64), torch.stack([counts, counts.flip(0)], dim=1)[:, 0]
    assert (one_for_all.stride(), every_other.stride()) == ((0,), (2,))
    expected = [zero_lowest_reference(weight, ranks, removed) for removed in (one_for_all, every_other)]
    if form == "C" and dtype != torch.float64:  # nothing of torch's is left to do
        monkeypatch.setattr(torch, "sub", None)
        monkeypatch.setattr(torch, "mul", None)
    found = [zero_lowest(weight, ranks, removed) for removed in (one_for_all, every_other)]
    for one, other in zip(found, expected, strict=True):
        wrong = int((one != other).any(dim=1).sum())
        assert wrong == 0, f"{wrong} of 64 rows are wrong"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_and_the_widest_short_ranks(dtype: torch.dtype) -> None:
    for rows, columns in ((3, 2**15), (3, 2**15 + 1), (700, 512)):
        weight, ranks, removed = case(rows, columns, dtype, 2)
        removed[:2] = torch.tensor([0, columns])
        assert torch.equal(zero_lowest(weight, ranks, removed), zero_lowest_reference(weight, ranks, removed)), (
            rows,
            columns,
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.int16, torch.int32])
def test_the_kernel_has_every_pair_of_sizes_and_any_number_of_threads(
    dtype: torch.dtype, kind: torch.dtype, form: str, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, ranks, removed = case(37, 515, dtype, 4)
    ranks = ranks.to(kind)
    if form == "C" and dtype != torch.float64:  # nothing of torch's is left to do
        monkeypatch.setattr(torch, "sub", None)
        monkeypatch.setattr(torch, "mul", None)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(zero_lowest(weight, ranks, removed), zero_lowest_reference(weight, ranks, removed))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 129), (300, 4096), (64, 2**15 + 3)])
def test_a_gpu_masks_as_the_cpu_does(dtype: torch.dtype, rows: int, columns: int) -> None:
    weight, ranks, removed = case(rows, columns, dtype, 3)
    expected = zero_lowest_reference(weight, ranks, removed)
    device = torch.device("cuda")
    found = zero_lowest(weight.to(device), ranks.to(device), removed)
    assert torch.equal(found.cpu(), expected)
    stored = weight.to(device).t().contiguous().t()
    assert torch.equal(zero_lowest(stored, ranks.to(device), removed).cpu(), expected)
    one_for_all = removed[:1].to(device).expand(rows)
    expected = zero_lowest_reference(weight, ranks, one_for_all.cpu())
    assert torch.equal(zero_lowest(weight.to(device), ranks.to(device), one_for_all).cpu(), expected)
