"""The Triton form of `masking.zero_lowest`: each weight and rank is read once, each result written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 1024
"""Shape of the tile that one program masks."""


@triton.jit  # type: ignore[untyped-decorator]
def _zero_lowest(  # type: ignore[no-untyped-def]  # Triton compiles it
    weight, ranks, removed, out, rows, columns,
    weight_row, weight_column, ranks_row, ranks_column, removed_row, out_row, out_column,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    row, column = row.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    value = tl.load(weight + row * weight_row + column * weight_column, mask=inside)
    rank = tl.load(ranks + row * ranks_row + column * ranks_column, mask=inside, other=0).to(tl.int32)
    count = tl.load(removed + row * removed_row, mask=row < rows, other=0)
    stays = tl.where(rank >= count, value, tl.zeros_like(value))
    tl.store(out + row * out_row + column * out_column, stays, mask=inside)


def triton_zero_lowest(weight: Tensor, ranks: Tensor, removed: Tensor, out: Tensor) -> None:
    """Write `masking.zero_lowest` to `out`; all on one device, any strides, `removed` int32."""
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
    with torch.cuda.device_of(weight):
        _zero_lowest[grid](
            weight, ranks, removed, out, rows, columns,
            *weight.stride(), *ranks.stride(), *removed.stride(), *out.stride(),
            tile_rows=_ROWS, tile_columns=_COLUMNS,
        )  # fmt: skip
