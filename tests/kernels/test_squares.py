"""Are the sums of squares those of the definition: on a CPU bit for bit, on a GPU to float32's last digits?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.kernels.squares import column_squares, squares_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_a_cpu_gives_the_bits_of_the_definition(
    dtype: torch.dtype, sequences: int, tokens: int, columns: int, seed: int
) -> None:
    text = inputs((sequences, tokens, columns), dtype, seed)
    before = text.clone()
    found = column_squares(text)
    assert found.dtype == torch.float32
    assert torch.equal(found, squares_reference(text))
    assert torch.equal(text, before), "column_squares changed its argument"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_agrees_to_float32(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 1), (3, 17, 193), (4, 512, 4096)):
        text = inputs(shape, dtype)
        exact = text.double().square().sum(dim=(0, 1))
        torch.testing.assert_close(column_squares(text.to("cuda")).cpu().double(), exact, rtol=1e-5, atol=0)
        strided = text.transpose(0, 1).contiguous().transpose(0, 1).to("cuda")
        torch.testing.assert_close(column_squares(strided).cpu().double(), exact, rtol=1e-5, atol=0)
