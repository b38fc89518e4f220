"""A weight with zeros where its rank is below its row's count: what a candidate costs beside its matrix products.

One pass reads weight and rank and writes the result: on a GPU a Triton kernel, on a CPU one in C (passes.c). Where
there is none, torch on a CPU converts and multiplies by booleans one at a time; integers it handles by the vector. A
rank minus its row's count has its sign bit set where the weight goes, so the arithmetic shift of the complement is a
mask of ones where it stays: a difference, a shift and an AND on the weights' own bits. Without Triton a GPU has a
comparison and a product.
"""

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from neuronal_ray.core.kernels.build import passes
from neuronal_ray.core.kernels.dispatch import for_triton

_INTEGERS = {2: torch.int16, 4: torch.int32}
"""By the size of a weight in bytes."""

_SLAB = 2**18
"""Weights that pass through the four steps at a time: they stay in a core's cache."""


def cut_reference(
    weight: Float[Tensor, "rows columns"], ranks: Int[Tensor, "rows columns"], removed: Int32[Tensor, " rows"]
) -> Float[Tensor, "rows columns"]:
    """The definition; weights that go may be -0.0 here."""
    return weight * (ranks >= removed.to(ranks.device)[:, None])


def apply_cut(
    weight: Float[Tensor, "rows columns"],
    ranks: Int[Tensor, "rows columns"],
    removed: Int32[Tensor, " rows"],
    *,
    out: Float[Tensor, "rows columns"] | None = None,
) -> Float[Tensor, "rows columns"]:
    """`weight` with zeros for the `removed` lowest ranks of each row, in `out` or in new memory in its own order."""
    out = torch.empty_like(weight) if out is None else out
    if for_triton(weight, ranks):
        from neuronal_ray.core.kernels.triton_cut import triton_cut

        triton_cut(weight, ranks, removed.to(weight.device), out)
        return out
    if _cut_in_one_pass(weight, ranks, removed, out):
        return out
    integer = _INTEGERS.get(weight.itemsize)
    if weight.device.type != "cpu" or integer is None or ranks.itemsize > weight.itemsize:
        return torch.mul(weight, ranks >= removed.to(ranks.device)[:, None], out=out)
    rows, columns = weight.shape
    # 1 less: negative where rank >= removed. removed <= columns <= the type's largest number, so none wraps around.
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


def _cut_in_one_pass(weight: Tensor, ranks: Tensor, removed: Tensor, out: Tensor) -> bool:
    """`apply_cut` by the kernel for CPUs, if there is one for these."""
    here = (weight, ranks, removed, out)
    if not all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in here):
        return False
    if weight.itemsize not in _INTEGERS or ranks.dtype not in _INTEGERS.values() or removed.dtype != torch.int32:
        return False
    kernels = passes()
    if kernels is None:
        return False
    cut = getattr(kernels, f"cut_{8 * weight.itemsize}_{8 * ranks.itemsize}")
    cut(*(tensor.data_ptr() for tensor in here), *weight.shape, torch.get_num_threads())
    return True
