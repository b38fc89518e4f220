"""Each weight's place in its row's ascending order of score: sorted once, cut by every candidate.

torch's stable sort of a row carries 64-bit positions along. On a CPU a score's bits and its column fit in one 64-bit
number whose order is theirs, ties included, and numpy sorts such numbers by the vector; on a GPU some rows are sorted
at a time, so that positions never exist for a whole matrix.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

_INT16_COLUMNS = 2**15
SLICES = {"cpu": 2**22, "cuda": 2**24}
"""Scores that are sorted at a time, by the type of device: about 24 bytes each, keys or positions among them."""

_PART = 2**18
"""Scores that one thread sorts at a time; so few alone are sorted where they are, for starting threads costs more."""


def rank_dtype(columns: int) -> torch.dtype:
    """The integer type of ranks in rows of `columns` weights."""
    return torch.int16 if columns <= _INT16_COLUMNS else torch.int32


def rank_reference(score: Float[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """The definition: positions in a stable ascending sort of each row."""
    order = score.argsort(dim=1, stable=True)
    positions = torch.arange(score.shape[1], dtype=rank_dtype(score.shape[1]), device=score.device)
    return torch.empty_like(order, dtype=positions.dtype).scatter_(1, order, positions.expand_as(order))


def rank(score: Float[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Position of each weight in its row's ascending order of score, in `rank_dtype`; of equal scores the lower column
    comes first. NaN comes last.
    """
    rows, columns = score.shape
    ranks = torch.empty(rows, columns, dtype=rank_dtype(columns), device=score.device)
    positions = torch.arange(columns, dtype=ranks.dtype, device=score.device)
    step = max(1, SLICES[score.device.type] // max(1, columns))
    for start in range(0, rows, step):
        here = slice(start, start + step)
        order = _order(score[here])  # [rows of the slice, columns]
        ranks[here].scatter_(1, order, positions.expand_as(order))
    return ranks


def _order(score: Float[Tensor, "rows columns"]) -> Int64[Tensor, "rows columns"]:
    """The columns of each row by their scores."""
    if score.device.type != "cpu" or score.dtype == torch.float64:
        return score.argsort(dim=1, stable=True)
    numbers = torch.arange(score.shape[1])
    keys = _ordered_bits(score.float()).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(numbers)
    _sort(keys)
    return keys.bitwise_and_(2**32 - 1)


def _ordered_bits(score: Float[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Integers in the order of the scores: a float's bits, those below the sign turned over where it is negative."""
    bits = torch.where(score.isnan(), torch.nan, score + 0.0).view(torch.int32)  # -0.0 becomes 0.0, each NaN the same
    return bits ^ (bits >> 31).bitwise_and_(2**31 - 1)


def _sort(keys: Int[Tensor, "rows columns"]) -> None:
    """Each row in place; numpy lets other threads run meanwhile."""
    parts = [part.numpy() for part in keys.split(max(1, _PART // max(1, keys.shape[1])))]
    if len(parts) == 1:
        parts[0].sort(axis=1)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(lambda part: part.sort(axis=1), parts))
