"""The Triton form of `norm.rms_norm`: one program per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDE = 4096  # columns from which more warps share a row


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]  # Triton compiles it
    inputs, weight, out, columns, eps, rounded: tl.constexpr, plus_one: tl.constexpr, width: tl.constexpr
):
    start = tl.program_id(0).to(tl.int64) * columns
    column = tl.arange(0, width)
    inside = column < columns
    value = tl.load(inputs + start + column, mask=inside, other=0.0)
    wide = value.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    if rounded:
        normed = normed.to(value.dtype).to(tl.float32)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if plus_one:
        factor += 1.0
    tl.store(out + start + column, (factor * normed).to(value.dtype), mask=inside)


def triton_rms_norm(inputs: Tensor, weight: Tensor, out: Tensor, *, eps: float, rounded: bool, plus_one: bool) -> None:
    """Write `norm.rms_norm` to `out`; all contiguous and on one device."""
    assert all(tensor.is_contiguous() for tensor in (inputs, weight, out))
    columns = len(weight)
    width = triton.next_power_of_2(columns)
    with torch.cuda.device_of(inputs):
        _rms_norm[(inputs.numel() // columns,)](
            inputs, weight, out, columns, eps,
            rounded=rounded, plus_one=plus_one, width=width, num_warps=8 if columns >= _WIDE else 4,
        )  # fmt: skip
