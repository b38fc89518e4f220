"""Masking a weight by its ranking: the cost of a candidate in addition to its matrix products.

One pass reads weight and rank and writes the result: a Triton kernel on a GPU, a C kernel (passes.c) on a CPU. Without
the C kernel, integer operations on the weight's bits are used, because torch does not vectorize products with booleans:
count - 1 - rank is negative where the weight stays, so its arithmetic right shift is a mask of ones there, which is
ANDed with the bits. Without Triton a GPU compares and multiplies.
"""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from neuronal_ray.core.kernels.build import passes
from neuronal_ray.core.kernels.dispatch import for_triton

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""Integer types by the size of a weight in bytes."""

_SLAB = 2**18
"""Weights that pass through all steps at a time, so that they stay in a core's cache."""


def zero_lowest_reference(
    weight: Float[Tensor, "rows columns"], ranks: Int[Tensor, "rows columns"], removed: Int32[Tensor, " rows"]
) -> Float[Tensor, "rows columns"]:
    """Define `zero_lowest`, except that removed weights may be -0.0."""
    return weight * (ranks >= removed.to(ranks.device)[:, None])


def zero_lowest(
    weight: Float[Tensor, "rows columns"],
    ranks: Int[Tensor, "rows columns"],
    removed: Int32[Tensor, " rows"],
    *,
    out: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """Return `weight` with zeros for the `removed` lowest ranks of each row, in `out` or in new memory.

    New memory has the strides of `weight`.
    """
    out = torch.empty_like(weight) if out is None else out
    removed = removed.contiguous()  # one count for all rows may be an expanded tensor
    if for_triton(weight, ranks):
        from neuronal_ray.core.kernels.triton_masking import triton_zero_lowest

        triton_zero_lowest(weight, ranks, removed.to(weight.device), out)
        return out
    if _run_c_kernel(weight, ranks, removed, out):
        return out
    integer = _INTEGERS.get(weight.itemsize)
    if weight.device.type != "cpu" or integer is None or ranks.itemsize > weight.itemsize:
        return torch.mul(weight, ranks >= removed.to(ranks.device)[:, None], out=out)
    rows, columns = weight.shape
    # removed - 1 - rank is negative where rank >= removed; removed <= columns <= the type's maximum: no overflow.
    last = (removed - 1).to(integer)[:, None]  # [rows] -> [rows, 1]
    bits, masks = weight.view(integer), out.view(integer)
    step = max(1, _SLAB // max(1, columns)) if weight.is_contiguous() else rows
    for start in range(0, rows, step):
        here = slice(start, start + step)
        mask = masks[here]
        mask.copy_(ranks[here])
        torch.sub(last[here], mask, out=mask)
        mask.bitwise_right_shift_(8 * weight.itemsize - 1)
        torch.bitwise_and(bits[here], mask, out=mask)
    return out


def _run_c_kernel(weight: Tensor, ranks: Tensor, removed: Tensor, out: Tensor) -> bool:
    """Run the C kernel if it supports these tensors; return whether it ran."""
    tensors = (weight, ranks, removed, out)
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors):
        return False
    if weight.itemsize not in _INTEGERS or ranks.dtype not in _INTEGERS.values() or removed.dtype != torch.int32:
        return False
    kernels = passes()
    if kernels is None:
        return False
    kernel = getattr(kernels, f"zero_lowest_{8 * weight.itemsize}_{8 * ranks.itemsize}")
    kernel(*(tensor.data_ptr() for tensor in tensors), *weight.shape, torch.get_num_threads())
    return True
