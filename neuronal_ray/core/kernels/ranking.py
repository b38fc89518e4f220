"""Ranking: each weight's position in its row's ascending order of score.

torch's stable sort of a row also moves 64-bit positions. On a CPU a score's bits and its column fit into one 64-bit key
that sorts in the same order, ties included, and numpy's sort of such keys is vectorized. On a GPU a few rows are
sorted at a time, so that 64-bit positions never exist for a whole matrix.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

_INT16_COLUMNS = 2**15
SLICES = {"cpu": 2**22, "cuda": 2**24}
"""Scores sorted at a time, by device type; each takes about 24 bytes, its key or position included."""

_THREAD_SCORES = 2**18
"""Scores that one thread sorts at a time; up to so many are sorted by the caller, as starting threads takes longer."""


def rank_dtype(columns: int) -> torch.dtype:
    """Return the integer type of ranks in rows of `columns` weights."""
    return torch.int16 if columns <= _INT16_COLUMNS else torch.int32


def rank_reference(score: Float[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Define `rank`: positions in a stable ascending sort of each row."""
    order = score.argsort(dim=1, stable=True)
    positions = torch.arange(score.shape[1], dtype=rank_dtype(score.shape[1]), device=score.device)
    return torch.empty_like(order, dtype=positions.dtype).scatter_(1, order, positions.expand_as(order))


def rank(score: Float[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Return the position of each weight in its row's ascending order of score, in `rank_dtype`.

    Of equal scores the lower column comes first; NaN comes last.
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
    """Return the columns of each row in ascending order of score."""
    if score.device.type != "cpu" or score.dtype == torch.float64:
        return score.argsort(dim=1, stable=True)
    numbers = torch.arange(score.shape[1])
    keys = _ordered_bits(score.float()).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(numbers)
    _sort(keys)
    return keys.bitwise_and_(2**32 - 1)


def _ordered_bits(score: Float[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Return integers in the order of the scores: a float's bits, all but the sign inverted for negative numbers."""
    bits = torch.where(score.isnan(), torch.nan, score + 0.0).view(torch.int32)  # one form of 0.0 and of NaN
    return bits ^ (bits >> 31).bitwise_and_(2**31 - 1)


def _sort(keys: Int[Tensor, "rows columns"]) -> None:
    """Sort each row in place, in several threads: numpy's sort releases the interpreter lock."""
    chunks = [rows.numpy() for rows in keys.split(max(1, _THREAD_SCORES // max(1, keys.shape[1])))]
    if len(chunks) == 1:
        chunks[0].sort(axis=1)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(lambda chunk: chunk.sort(axis=1), chunks))
