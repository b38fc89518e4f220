"""The Triton form of `rotary.rotary`: one program per token, for all of its heads."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _rotary(  # type: ignore[no-untyped-def]  # Triton compiles it
    states, cos, sin, out, heads, half,
    states_sequence, states_head, states_token, out_sequence, out_head, out_token,
    cos_sequence, cos_token, sin_sequence, sin_token,
    tile_heads: tl.constexpr, tile_half: tl.constexpr,
):  # fmt: skip
    token, sequence = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, low = tl.arange(0, tile_heads)[:, None], tl.arange(0, tile_half)[None, :]
    inside_row, inside = low < half, (head < heads) & (low < half)
    cos += sequence * cos_sequence + token * cos_token
    sin += sequence * sin_sequence + token * sin_token
    cos_low = tl.load(cos + low, mask=inside_row, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + half + low, mask=inside_row, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + low, mask=inside_row, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + half + low, mask=inside_row, other=0.0).to(tl.float32)
    here = states + sequence * states_sequence + head * states_head + token * states_token + low
    first = tl.load(here, mask=inside, other=0.0)
    kind = first.dtype
    first = first.to(tl.float32)
    second = tl.load(here + half, mask=inside, other=0.0).to(tl.float32)
    turned = (first * cos_low).to(kind).to(tl.float32) + (-second * sin_low).to(kind).to(tl.float32)
    turned_high = (second * cos_high).to(kind).to(tl.float32) + (first * sin_high).to(kind).to(tl.float32)
    there = out + sequence * out_sequence + head * out_head + token * out_token + low
    tl.store(there, turned.to(kind), mask=inside)
    tl.store(there + half, turned_high.to(kind), mask=inside)


def triton_rotary(states: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Write `rotary.rotary` to `out`; all on one device, features contiguous."""
    assert all(tensor.stride(-1) == 1 for tensor in (states, cos, sin, out))
    sequences, heads, tokens, features = states.shape
    each = (1 if len(cos) > 1 else 0, 1 if len(sin) > 1 else 0)  # one row of angles can apply to all sequences
    with torch.cuda.device_of(states):
        _rotary[(tokens, sequences)](
            states, cos, sin, out, heads, features // 2,
            *states.stride()[:3], *out.stride()[:3],
            each[0] * cos.stride(0), cos.stride(1), each[1] * sin.stride(0), sin.stride(1),
            tile_heads=triton.next_power_of_2(heads), tile_half=triton.next_power_of_2(features // 2),
            enable_fp_fusion=False,  # each product is rounded before the addition
        )  # fmt: skip
