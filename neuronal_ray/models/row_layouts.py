"""Candidate mappings from the rows of a linear to the columns of its reader, where their numbers differ."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """One mapping: `sources` [rows, fan] holds the columns of the reader that each row determines.

    Changing a row changes the whole unit (attention head) of `unit` columns around each of its sources.
    """

    sources: Int64[Tensor, "rows fan"]
    unit: int
    columns: int

    def reached(self) -> Bool[Tensor, "rows columns"]:
        """Return which columns change when a row changes."""
        units = torch.zeros(len(self.sources), self.columns // self.unit, dtype=torch.bool)
        units.scatter_(1, self.sources // self.unit, True)
        return units.repeat_interleave(self.unit, dim=1)  # [rows, units] -> [rows, columns]


def row_layouts(rows: int, columns: int, num_heads: int | None) -> list[RowLayout]:
    """Return the possible mappings of `rows` outputs to `columns` inputs of their reader, rows != columns.

    Grouped-query keys or values: each head belongs to the query heads of its group. Fused query, key and value: one
    after the other, or together per group of heads. Fused gate and up: one after the other, or alternating. A model
    without attention has no heads (None).
    """
    layouts: list[RowLayout] = []
    if rows == 2 * columns:
        column = torch.arange(columns)
        layouts += [
            RowLayout(sources[:, None], 1, columns) for sources in (column.repeat(2), column.repeat_interleave(2))
        ]
    if not num_heads or columns % num_heads or rows % (columns // num_heads):
        return layouts
    head_dim = columns // num_heads
    row_heads = rows // head_dim
    if row_heads < num_heads and num_heads % row_heads == 0:
        layouts.append(_by_heads(_key_heads(row_heads, num_heads), head_dim, columns))
    num_keys, odd = divmod(row_heads - num_heads, 2)
    if num_keys > 0 and not odd and num_heads % num_keys == 0:
        fan = num_heads // num_keys
        queries = torch.arange(num_heads)[:, None].expand(-1, fan)  # [query heads, fan], each its own only source
        keys = _key_heads(num_keys, num_heads)  # [key heads, fan]
        layouts.append(_by_heads(torch.cat([queries, keys, keys]), head_dim, columns))
        together = torch.cat([queries.reshape(num_keys, fan, fan), keys[:, None], keys[:, None]], dim=1)
        layouts.append(_by_heads(together.reshape(row_heads, fan), head_dim, columns))
    return layouts


def _key_heads(num_keys: int, num_heads: int) -> Int64[Tensor, "keys fan"]:
    """Return the query heads of each key head's group."""
    return torch.arange(num_heads).reshape(num_keys, -1)


def _by_heads(heads: Int64[Tensor, "row_heads fan"], head_dim: int, columns: int) -> RowLayout:
    """Map row (head, dim) to column (source head, dim)."""
    dims = torch.arange(head_dim)
    sources = heads[:, None, :] * head_dim + dims[None, :, None]  # [row heads, head dim, fan]
    return RowLayout(sources.flatten(0, 1), head_dim, columns)
