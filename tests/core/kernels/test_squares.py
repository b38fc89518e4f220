"""Sums of squares equal their definition: bit for bit on a CPU, up to float32 rounding on a GPU."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.kernels import squares
from neuronal_ray.core.kernels.build import passes
from neuronal_ray.core.kernels.squares import column_squares, squares_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(params=["C", "torch"], autouse=True)
def form(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run with the kernel, which must be in use where there is a compiler, and without it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(squares, "_adds_as_torch", lambda _: False)
        elif passes() is None:
            pytest.skip("no compiler")
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.integers(1, 4),
    st.integers(1, 300),
    st.integers(1, 70) | st.integers(1, 12).map(lambda some: 32 * some),
    st.integers(0, 2**31),
)
def test_a_cpu_gives_the_bits_of_the_definition(
    dtype: torch.dtype, sequences: int, tokens: int, columns: int, seed: int
) -> None:
    text = inputs((sequences, tokens, columns), dtype, seed)
    before = text.clone()
    found = column_squares(text)
    assert found.dtype == torch.float32
    assert torch.equal(found, squares_reference(text))
    assert torch.equal(text, before), "column_squares changed its argument"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 2048, 192), (8, 256, 512), (1, 5000, 288), (3, 4096, 1024)])
def test_long_texts_and_any_number_of_threads_too(
    dtype: torch.dtype, shape: tuple[int, int, int], one_thread: None
) -> None:
    text = inputs(shape, dtype)
    expected = squares_reference(text)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(column_squares(text), expected), threads


def test_this_torch_adds_in_the_order_of_the_kernel(form: str) -> None:
    """Otherwise a search would not use the kernel, as another order gives other bits."""
    assert all(squares._adds_as_torch(dtype) for dtype in (torch.float32, torch.bfloat16)) == (form == "C")


def test_what_is_not_a_plain_matrix_is_left_to_torch() -> None:
    text = inputs((2, 64, 96), torch.float32)
    for strided in (text.transpose(0, 1), text[:, ::2], text[:, :, :64]):
        assert torch.equal(column_squares(strided), squares_reference(strided))
    text.requires_grad_()
    column_squares(text).sum().backward()
    assert torch.equal(text.grad, 2 * text)


def test_numbers_that_are_none_and_overflow_are_kept() -> None:
    text = torch.ones(1, 40, 32)
    text[0, 3, 0], text[0, 5, 1], text[0, 7, 2] = torch.nan, torch.inf, 1e30
    assert column_squares(text)[:4].isfinite().tolist() == [False, False, False, True]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_agrees_to_float32(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (3, 17, 193), (4, 512, 4096)):
        text = inputs(shape, dtype)
        exact = text.double().square().sum(dim=(0, 1))
        torch.testing.assert_close(column_squares(text.to("cuda")).cpu().double(), exact, rtol=1e-5, atol=0)
        strided = text.transpose(0, 1).contiguous().transpose(0, 1).to("cuda")
        torch.testing.assert_close(column_squares(strided).cpu().double(), exact, rtol=1e-5, atol=0)
