"""A script that compares the Triton kernels with their references in Triton's interpreter; needs TRITON_INTERPRET=1."""

from itertools import product

import torch

from neuronal_ray.core.kernels.gate import gated_reference
from neuronal_ray.core.kernels.masking import zero_lowest_reference
from neuronal_ray.core.kernels.norm import RmsNorm, rms_norm_reference
from neuronal_ray.core.kernels.rotary import rotary_reference
from neuronal_ray.core.kernels.triton_gate import triton_gated
from neuronal_ray.core.kernels.triton_masking import triton_zero_lowest
from neuronal_ray.core.kernels.triton_norm import triton_rms_norm
from neuronal_ray.core.kernels.triton_rotary import triton_rotary

DTYPES = (torch.float32, torch.float16)
SOURCE = torch.Generator().manual_seed(0)


def cuts() -> int:
    """Test odd numbers of rows and columns, weights of both memory orders, counts that all rows share."""
    cases = 0
    shapes, orders, shared = ((1, 1), (5, 33), (9, 1025)), (False, True), (False, True)
    for (rows, columns), dtype, transposed, one_for_all in product(shapes, DTYPES, orders, shared):
        weight = torch.randn(rows, columns, generator=SOURCE).to(dtype)
        ranks = torch.rand(rows, columns, generator=SOURCE).argsort(dim=1).to(torch.int16)
        removed = torch.randint(0, columns + 1, (rows,), generator=SOURCE, dtype=torch.int32)
        removed = removed[:1].expand(rows) if one_for_all else removed
        stored = weight.t().contiguous().t() if transposed else weight
        out = torch.full_like(stored, torch.nan)
        triton_zero_lowest(stored, ranks, removed, out)
        assert torch.equal(out, zero_lowest_reference(weight, ranks, removed)), (rows, columns, dtype, transposed)
        cases += 1
    return cases


def norms() -> int:
    """Test all forms; a float16 may be rounded to its other neighbor, because the order of the sum differs."""
    cases = 0
    for shape, dtype, rounded, plus_one in product(
        ((1, 1), (2, 3, 33), (3, 1024)), DTYPES, (True, False), (True, False)
    ):
        inputs, weight = (torch.randn(size, generator=SOURCE).to(dtype) for size in (shape, shape[-1:]))
        form = RmsNorm(eps=1e-5, rounded=rounded, plus_one=plus_one)
        out = torch.full_like(inputs, torch.nan)
        triton_rms_norm(inputs, weight, out, eps=form.eps, rounded=rounded, plus_one=plus_one)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, rms_norm_reference(inputs, weight, form), rtol=tolerance, atol=tolerance)
        cases += 1
    return cases


def rotations() -> int:
    """Test strided heads, as in attention, with angles for all sequences together or for each."""
    cases = 0
    for (heads, features), dtype, rows in product(((1, 2), (3, 12), (4, 16)), DTYPES, (1, 2)):
        states = torch.randn(2, 5, heads, features, generator=SOURCE).to(dtype).transpose(1, 2)
        cos, sin = (torch.randn(rows, 5, features, generator=SOURCE).to(dtype) for _ in range(2))
        out = torch.full_like(states, torch.nan)
        triton_rotary(states, cos, sin, out)
        assert torch.equal(out, rotary_reference(states, cos, sin)), (heads, features, dtype, rows)
        cases += 1
    return cases


def gates() -> int:
    """Test halves of one tensor and two tensors; a float16 may be rounded to its other neighbor."""
    cases = 0
    for shape, dtype, halves in product(((1, 1), (2, 3, 33), (3, 2049)), DTYPES, (False, True)):
        both = 4 * torch.randn(*shape[:-1], 2 * shape[-1], generator=SOURCE).to(dtype)
        gate, values = both.chunk(2, dim=-1) if halves else (half.contiguous() for half in both.chunk(2, dim=-1))
        out = torch.full(shape, torch.nan, dtype=dtype)
        triton_gated(gate, values, out)
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(out, gated_reference(gate, values), rtol=tolerance, atol=tolerance)
        cases += 1
    return cases


if __name__ == "__main__":
    print(f"{cuts()} cuts, {norms()} normalizations, {rotations()} rotations, {gates()} gates")
