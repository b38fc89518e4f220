"""The fused normalization equals the one that it replaces, on a GPU, for all forms and dtypes."""

from itertools import product

import pytest
import torch

from neuronal_ray.core.kernels.norm import RmsNorm, rms_norm, rms_norm_reference, takes

FORMS = [
    RmsNorm(eps=1e-5, rounded=rounded, plus_one=plus_one) for rounded, plus_one in product((True, False), repeat=2)
]


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_is_the_formula(form: RmsNorm) -> None:
    source = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(2, 3, 8, generator=source), torch.randn(8, generator=source)
    found = rms_norm_reference(inputs, weight, form)
    for row, expected in zip(found.flatten(0, 1), inputs.flatten(0, 1).double(), strict=True):
        factor = weight.double() + (1 if form.plus_one else 0)
        exact = factor * expected / (sum(float(value) ** 2 for value in expected) / 8 + form.eps) ** 0.5
        torch.testing.assert_close(row.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_cpu_has_no_kernel_for_it() -> None:
    assert not takes(torch.ones(2, 8), torch.ones(8))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (2, 5, 96), (1, 300, 4096), (3, 5120), (2, 2**14)])
def test_a_gpu_gives_the_reference(form: RmsNorm, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(1)
    inputs, weight = (torch.randn(size, generator=source).to("cuda", dtype) for size in (shape, shape[-1:]))
    assert takes(inputs, weight)
    found, expected = rms_norm(inputs, weight, form), rms_norm_reference(inputs, weight, form)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if dtype != torch.float32:  # its last bit tells the order of the sum
        assert float((found == expected).float().mean()) > 0.98
    assert torch.equal(found, rms_norm(inputs, weight, form)), "another run, other bits"


@pytest.mark.gpu
def test_unsupported_tensors_are_left_to_torch() -> None:
    inputs, weight = torch.ones(2, 8, device="cuda"), torch.ones(8, device="cuda")
    assert not takes(inputs.bfloat16(), weight)
    assert not takes(inputs.double(), weight.double())
    assert not takes(inputs.t().contiguous().t(), weight)
    assert not takes(inputs, weight[:1].expand(8))
    assert not takes(inputs.clone().requires_grad_(), weight)
    assert not takes(torch.ones(2, 2**14 + 1, device="cuda"), torch.ones(2**14 + 1, device="cuda"))
