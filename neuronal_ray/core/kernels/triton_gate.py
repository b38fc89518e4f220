"""The Triton form of `gate.gated`: one program per token and tile of columns."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 2048


@triton.jit  # type: ignore[untyped-decorator]
def _gated(  # type: ignore[no-untyped-def]  # Triton compiles it
    gates, values, out, columns, gates_token, values_token, tile: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = column < columns
    gate = tl.load(gates + token * gates_token + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    opened = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    value = tl.load(values + token * values_token + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * columns + column, (opened * value).to(gate.dtype), mask=inside)


def triton_gated(gates: Tensor, values: Tensor, out: Tensor) -> None:
    """Write `gate.gated` to `out`; all on one device, columns contiguous, `out` contiguous."""
    assert gates.stride(-1) == values.stride(-1) == 1
    assert out.is_contiguous()
    columns = gates.shape[-1]
    rows, others = gates.flatten(0, -2), values.flatten(0, -2)  # views, unless the tokens' strides are irregular
    tile = min(_TILE, triton.next_power_of_2(columns))
    with torch.cuda.device_of(gates):
        _gated[(len(rows), triton.cdiv(columns, tile))](
            rows, others, out, columns, rows.stride(0), others.stride(0), tile=tile
        )
