"""The fused gate equals the product that it replaces, on a GPU, for all dtypes and strides."""

import math

import pytest
import torch

from neuronal_ray.core.kernels.gate import gated, gated_reference, takes


def test_the_reference_is_the_formula() -> None:
    gates, values = torch.tensor([[-3.0, -0.5, 0.0, 2.0]]), torch.tensor([[1.5, -2.0, 7.0, 0.25]])
    (found,) = gated_reference(gates, values).tolist()
    expected = [
        value * gate / (1 + math.exp(-gate)) for gate, value in zip(gates[0].tolist(), values[0].tolist(), strict=True)
    ]
    assert found == pytest.approx(expected, rel=1e-6)


def test_a_cpu_has_no_kernel_for_it() -> None:
    assert not takes(torch.ones(2, 8), torch.ones(2, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 96), (1, 300, 11008), (7, 2049)])
@pytest.mark.parametrize("halves", [False, True])
def test_a_gpu_gives_the_reference(dtype: torch.dtype, shape: tuple[int, ...], halves: bool) -> None:
    source = torch.Generator().manual_seed(1)
    both = 4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=source).to("cuda", dtype)
    gates, values = both.chunk(2, dim=-1)
    if not halves:
        gates, values = gates.contiguous(), values.contiguous()
    assert takes(gates, values)
    found, expected = gated(gates, values), gated_reference(gates, values)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if dtype != torch.float32:  # its last bit tells the exponential's
        assert float((found == expected).float().mean()) > 0.98
    assert torch.equal(found, gated(gates, values)), "another run, other bits"


@pytest.mark.gpu
def test_far_gates_are_shut_or_open() -> None:
    gates = torch.tensor([[-1e4, -200.0, -0.0, 0.0, 200.0, 1e4]], device="cuda")
    assert torch.equal(gated(gates, torch.ones_like(gates)), gated_reference(gates, torch.ones_like(gates)))


@pytest.mark.gpu
def test_unsupported_tensors_are_left_to_torch() -> None:
    ones = torch.ones(4, 8, device="cuda")
    assert not takes(ones, ones.bfloat16())
    assert not takes(ones, ones[:1])
    assert not takes(ones.t().contiguous().t(), ones)
    assert not takes(ones.clone().requires_grad_(), ones)
    assert not takes(ones[:0], ones[:0])
    assert not takes(ones[0], ones[0])
