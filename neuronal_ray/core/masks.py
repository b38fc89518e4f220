"""Masks from rankings: rank the weights of each row once, then remove any number of the lowest.

Tie rule: of equal scores in a row, the lower column is removed first (a stable ascending sort) by default.
"""

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from neuronal_ray.core.kernels.ranking import rank, rank_dtype

_BINS = 2**15


def rank_rows(score: Float[Tensor, "rows columns"], *, lower_ties_first: bool = True) -> Int[Tensor, "rows columns"]:
    """Return the position of each weight in its row's ascending order of score, in the type of `rank_dtype`.

    Of equal scores the lower column comes first, or last (the released code's second sort is a descending one).
    """
    if not lower_ties_first:
        return rank_rows(score.flip(1)).flip(1)
    return rank(score)


def lowest_mask(ranks: Int[Tensor, "rows columns"], removed: Int32[Tensor, " rows"]) -> Bool[Tensor, "rows columns"]:
    """Return the mask, True where weights go: the `removed` lowest of each row."""
    return ranks < removed.to(ranks.device)[:, None]


def zeros_of(weight: Float[Tensor, "rows columns"]) -> Bool[Tensor, "rows columns"] | None:
    """Return where `weight` is zero, of either sign; None where it is zero nowhere."""
    zeros = weight == 0
    return zeros if bool(zeros.any()) else None


def rank_mask(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Return a ranking from which `lowest_mask` makes `mask`: in each row first its True columns, then the others."""
    removed = mask.sum(dim=1, keepdim=True)
    kept_rank = (~mask).cumsum(dim=1) + removed
    return torch.where(mask, mask.cumsum(dim=1), kept_rank).sub_(1).to(rank_dtype(mask.shape[1]))


def smallest(values: Float32[Tensor, "*shape"], count: int) -> Float32[Tensor, ""]:
    """Return the `count`-th smallest of values >= 0, whose bits sort as integers in the same order.

    A histogram of the upper half of the bits locates its bin, in a quarter of the time of topk or kthvalue.
    """
    bins = values.flatten().view(torch.int32) >> 16
    counts = bins.bincount(minlength=_BINS)
    up_to = counts.cumsum(0)
    selected = torch.searchsorted(up_to, count)
    before = int(up_to[selected] - counts[selected])
    return values.flatten()[bins == selected].kthvalue(count - before).values
