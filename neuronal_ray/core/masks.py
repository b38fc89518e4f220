"""Masks as cuts through a ranking: rank the weights of each row once, cut at any count.

Tie rule: of equal scores in a row, the lower column is removed first (a stable ascending sort) unless asked otherwise.
"""

import torch
from jaxtyping import Bool, Float, Float32, Int, Int32
from torch import Tensor

from neuronal_ray.core.kernels.ranking import rank, rank_dtype

_BINS = 2**15


def rank_rows(score: Float[Tensor, "rows columns"], *, lower_ties_first: bool = True) -> Int[Tensor, "rows columns"]:
    """Position of each weight in its row's ascending order of score, in the type that `rank_dtype` says.

    Of equal scores the lower column comes first, or last (the released code's second sort is a descending one).
    """
    if not lower_ties_first:
        return rank_rows(score.flip(1)).flip(1)
    return rank(score)


def cut(ranks: Int[Tensor, "rows columns"], removed: Int32[Tensor, " rows"]) -> Bool[Tensor, "rows columns"]:
    """The mask, True where weights go: the `removed` lowest of each row."""
    return ranks < removed.to(ranks.device)[:, None]


def rank_mask(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """A ranking whose cut at each row's number of True is `mask`: these first, then the others, by column."""
    removed = mask.sum(dim=1, keepdim=True)
    kept_rank = (~mask).cumsum(dim=1) + removed
    return torch.where(mask, mask.cumsum(dim=1), kept_rank).sub_(1).to(rank_dtype(mask.shape[1]))


def smallest(values: Float32[Tensor, "*shape"], count: int) -> Float32[Tensor, ""]:
    """The `count`-th smallest of values >= 0, whose bits are in their order as integers.

    A histogram of the upper half of the bits tells the bin it is in: a quarter of the time of topk or kthvalue.
    """
    bins = values.flatten().view(torch.int32) >> 16
    counts = bins.bincount(minlength=_BINS)
    up_to = counts.cumsum(0)
    its_bin = torch.searchsorted(up_to, count)
    before = int(up_to[its_bin] - counts[its_bin])
    return values.flatten()[bins == its_bin].kthvalue(count - before).values
