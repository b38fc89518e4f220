"""SparseGPT: the mask and the weight update of one linear in a single sweep over its columns."""

import logging
import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Method
from neuronal_ray.algorithms.methods import Quota
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.masks import rank_rows, smallest, zeros_of
from neuronal_ray.core.stats import Gram, RunningGram, Statistic

logger = logging.getLogger(__name__)

_RETRIES = 3
_LEAF_COLUMNS = 16


@dataclass(frozen=True, eq=False)
class Factor:
    """U, upper triangular with U^T U = H^-1, and the inputs that are always zero; shared by the input's linears."""

    upper: Float32[Tensor, "columns columns"]
    dead: Bool[Tensor, " columns"]


def score(
    weight: Float[Tensor, "rows columns"], inputs: Statistic, *, damping: float = 0.01
) -> Float32[Tensor, "rows columns"]:
    """Return W_ij^2 / [H^-1]_jj, the error that removing one weight costs (SparseGPT, ICML 2023, section 3.1).

    The score is 0 for inputs that are always zero.
    """
    factor = factorize(inputs, damping=damping)
    inverse_diagonal = factor.upper.square().sum(dim=0)  # of U^T U: [columns, columns] -> [columns]
    return (weight.float().square() / inverse_diagonal).masked_fill(factor.dead, 0)


def factorize(inputs: Statistic, *, damping: float = 0.01) -> Factor:
    """Return the Cholesky factor of the inverse Hessian, H = 2 / sequences * X^T X + damping * mean(diag) * I.

    SparseGPT, ICML 2023, section 3.2, in float32; H_jj = 1 for inputs that are always zero.
    Differs: where the authors' code stops with an error, the damping is raised tenfold up to three times, then the same
    dampings are tried in float64, each time with a warning. Raises BadInput when float64 fails too.
    """
    check(damping=damping)
    hessian = _hessian(inputs)
    if not hessian.isfinite().all():
        raise BadInput("the Hessian of the inputs has values that are not finite")
    dead = hessian.diagonal() == 0
    hessian.diagonal().masked_fill_(dead, 1)
    mean = hessian.diagonal().contiguous().mean()  # the order of the released code's sum
    attempts = [
        (dtype, damping * 10**power) for dtype in (torch.float32, torch.float64) for power in range(_RETRIES + 1)
    ]
    for attempt, (dtype, share) in enumerate(attempts):
        if attempt > 0:
            logger.warning("the Hessian of the inputs has no Cholesky factor: trying damping %g in %s", share, dtype)
        upper = _inverse_factor(hessian.to(dtype), share * mean)
        if upper is not None:
            return Factor(upper.float(), dead)
    raise BadInput(f"the Hessian of the inputs has no Cholesky factor in float64 with damping {share:g}")


def solve(
    weight: Float[Tensor, "rows columns"], factor: Factor, quota: Quota, *, slab: int = 128
) -> Float32[Tensor, "rows columns"]:
    """Return the weight with `quota.removed` zeros, the others updated to compensate (SparseGPT, algorithm 1).

    When the sweep reaches a slab of columns, the lowest W_ij^2 / U_jj^2 of all rows go, by the weights as updated so
    far, until round(removed * stop / columns) have gone in all. Tie rule: the lower row goes first, then the lower
    column. With groups, the lowest of each row's group go when the sweep reaches the group, the lower column first.
    Zeros of `weight` go whatever has been added to them by then: of a slab, or a group, at least its own zeros go, and
    so many others that enough is left for the zeros of later slabs; if there are more than `quota.removed`, all go.
    Differs: the authors' code removes all weights up to the one at index floor(numel * rate) of each slab in order, so
    at least one more; `quota.rate` asks for this. It lets zeros become numbers, which `quota.revive` asks for.
    """
    check(slab=slab)
    rows, columns = weight.shape
    group = quota.group
    assert 0 <= quota.removed <= rows * columns, (quota, rows, columns)
    if group:
        assert columns % group == 0, (quota, columns)
        assert quota.removed * group % (rows * columns) == 0, (quota, rows, columns)
        slab = max(slab // group, 1) * group
    # Columns of a leaf are updated one by one, later ones of the slab by a product: the same sums, in the released
    # code's order only when the whole slab is one leaf.
    leaf = group or (_LEAF_COLUMNS if quota.rate is None else slab)
    upper = factor.upper
    scale = upper.diagonal()[:, None]  # [columns, 1]
    work = weight.float().t().clone(memory_format=torch.contiguous_format)  # [columns, rows]
    work.masked_fill_(factor.dead[:, None], 0)
    errors = torch.empty_like(work[:slab])
    mask = torch.empty_like(errors, dtype=torch.bool)
    zeros = None if quota.revive else zeros_of(weight.t())  # [columns, rows]
    counts = _counts_of_slabs(quota, zeros, columns=columns, slab=slab)
    for first in range(0, columns, slab):
        last = min(first + slab, columns)
        own = None if zeros is None else zeros[first:last]
        if not group:
            importance = work[first:last].square() / scale[first:last].square()
            mask[: last - first] = _slab_mask(importance, quota, counts[first // slab], own)
        for start in range(first, last, leaf):
            stop = min(start + leaf, last)
            here = slice(start - first, stop - first)
            if group:
                importance = work[start:stop].square() / scale[start:stop].square()
                if own is not None:
                    importance.masked_fill_(own[here], -1)  # before all others
                mask[here] = rank_rows(importance.t()).t() < quota.removed * group // (rows * columns)
                if own is not None:
                    mask[here] |= own[here]
            divisor = scale[start:stop] / mask[here].float()  # infinite where a weight stays: its error is 0
            for column in range(start, stop):
                error = torch.div(work[column], divisor[column - start], out=errors[column - first])
                work[column + 1 : stop] -= upper[column, column + 1 : stop, None] * error
            work[start:stop] *= ~mask[here]
            work[stop:last].addmm_(upper[start:stop, stop:last].t(), errors[here], alpha=-1)
        work[last:].addmm_(upper[first:last, last:].t(), errors[: last - first], alpha=-1)
    return work.t().contiguous()


def check(*, damping: float = 0.01, slab: int = 128) -> None:
    """Raise BadInput for settings out of range."""
    if not 0 < damping < math.inf:
        raise BadInput(f"--set method.damping: {damping} given, expected a positive number")
    if slab < 1:
        raise BadInput(f"--set method.slab: {slab} given, expected at least 1")


def _counts_of_slabs(quota: Quota, zeros: Bool[Tensor, "columns rows"] | None, *, columns: int, slab: int) -> list[int]:
    """Return how many weights go in each slab: in proportion to its columns, but its zeros go and later ones can."""
    ends = [min(first + slab, columns) for first in range(0, columns, slab)]
    of_slab = [0] * len(ends) if zeros is None else [int(part.count_nonzero()) for part in zeros.split(slab)]
    later = sum(of_slab)
    removed, gone, counts = max(quota.removed, later), 0, []
    for end, own in zip(ends, of_slab, strict=True):
        later -= own
        count = min(max(round(removed * end / columns) - gone, own), removed - later - gone)
        counts.append(count)
        gone += count
    return counts


def _slab_mask(
    importance: Float32[Tensor, "slab rows"], quota: Quota, count: int, zeros: Bool[Tensor, "slab rows"] | None
) -> Bool[Tensor, "slab rows"]:
    """Return the mask of a slab that loses `count` weights, its `zeros` among them."""
    if quota.rate is not None:
        if zeros is not None:
            importance = importance.masked_fill(zeros, 0)
        index = min(int(importance.numel() * quota.rate), importance.numel() - 1)
        mask = importance <= smallest(importance, index + 1)
        return mask if zeros is None else mask | zeros
    if zeros is None:
        return _lowest(importance, count)
    others = count - int(zeros.count_nonzero())
    return _lowest(importance.masked_fill(zeros, torch.nan), others) | zeros  # its bits are above those of infinity


def _lowest(importance: Float32[Tensor, "slab rows"], count: int) -> Bool[Tensor, "slab rows"]:
    """Return True for the `count` lowest; of equals the lower row goes first, then the lower column."""
    if count == 0:
        return torch.zeros_like(importance, dtype=torch.bool)
    threshold = smallest(importance, count)
    mask = importance <= threshold
    surplus = int(mask.sum()) - count
    if surplus:
        tied = (importance == threshold).t()  # [rows, slab]
        position = tied.flatten().cumsum(0).view_as(tied)  # of each tied weight, from 1
        mask &= ~(tied & (position > int(position[-1, -1]) - surplus)).t()
    return mask


def _hessian(inputs: Statistic) -> Float32[Tensor, "columns columns"]:
    """Return 2 / sequences * X^T X in memory of its own."""
    if isinstance(inputs, RunningGram):
        return inputs.mean.clone()
    assert isinstance(inputs, Gram), type(inputs)
    return inputs.total * (2 / inputs.sequences)


def _inverse_factor(
    hessian: Float[Tensor, "columns columns"], damping: Float32[Tensor, ""]
) -> Float[Tensor, "columns columns"] | None:
    """Return U, upper triangular, with U^T U = (hessian + damping * I)^-1; None if this precision does not suffice."""
    damped = hessian.clone()
    damped.diagonal().add_(damping)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return None
    upper: Tensor
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if failed or not upper.isfinite().all() else upper


METHOD = Method(score=score, statistic=Gram, factorize=factorize, solve=solve, check=check, released=True)
