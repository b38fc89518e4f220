"""DSnoT: removed and kept weights swap places so that the expected output is restored; no weight changes its value.

Zhang et al., Dynamic Sparse No Training, ICLR 2024, section 3.2.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float32, Int8, Int32, Int64
from torch import Tensor

from neuronal_ray.algorithms.declarations import Refinement
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.stats import Moments

_LEAST_DIVISOR = 1e-30
_GREATEST_KEY = torch.finfo(torch.float32).max
_INFINITE_BITS = 0x7F800000  # infinity in float32
_NEGATIVE, _POSITIVE = 0, 1


@runtime_checkable
class HasMoments(Protocol):
    """A statistic with a_j, S_j and v_j, the norm, sum and variance of each input, float32 [columns] each."""

    @property
    def norm(self) -> Float32[Tensor, " columns"]: ...

    @property
    def sum(self) -> Float32[Tensor, " columns"]: ...

    @property
    def variance(self) -> Float32[Tensor, " columns"]: ...


def refine(
    weight: Float[Tensor, "rows columns"],
    score: Float32[Tensor, "rows columns"],
    mask: Bool[Tensor, "rows columns"],
    inputs: HasMoments,
    group: int,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
    variance_power: float = 1.0,
    same_sign: bool = False,
    swaps: float = 0.1,
) -> Bool[Tensor, "rows columns"]:
    """Return the mask after at most `max_cycles` swaps per row; every row and every group removes as many as before.

    D_ij = W_ij * S_j is what a weight adds to its output, e_i the sum of the removed D of row i, both over the tokens
    of one sequence. While |e_i| > `threshold`, a cycle restores the removed weight of e_i's sign with the largest
    |D_ij| / v_j^p, p being `variance_power`, and removes the kept weight of the other sign with the least Wanda score.
    No weight moves twice; a row ends when either weight does not exist. `same_sign` ends a row before e_i changes sign.
    With `group` > 0, `same_sign` always holds, and the removed weight is the one of least `score` in the restored
    weight's group, among those that were kept from the start; a cycle in a group without one does nothing. Tie rule:
    the lower column moves first.

    Differs: a row makes at most `swaps` * min(kept, removed) swaps, rounded down. The released code bounds the cycles
    alone: 50 of them exchange most of a row that keeps 50 weights, or end in an index error. Constant inputs (v_j = 0),
    where the released code divides by 0, come before all others in the order of |D_ij|, unless `variance_power` is 0.
    """
    check(max_cycles=max_cycles, threshold=threshold, variance_power=variance_power, swaps=swaps)
    contribution = weight.float() * inputs.sum
    error = torch.where(mask, contribution, 0.0).sum(dim=1)  # [rows, columns] -> [rows]
    divisor = inputs.variance.pow(variance_power)
    wanda = weight.float().abs() * inputs.norm
    num_removed = mask.sum(dim=1)  # [rows, columns] -> [rows]
    smaller = torch.minimum(num_removed, mask.shape[1] - num_removed)
    limit = (smaller.double() * swaps).floor().long().clamp_max(max_cycles)
    depth = int(limit.max())
    if depth == 0:
        return mask.clone()
    sign = contribution.sign().to(torch.int8)
    key = (contribution.abs() / divisor.clamp_min(_LEAST_DIVISOR)).clamp_max(_GREATEST_KEY)
    growth, num_growth = _first_of_each_sign(_bits(key), sign * mask, depth)
    if group > 0:
        return _swap_in_groups(
            mask,
            contribution,
            error,
            limit,
            growth=growth,
            num_growth=num_growth,
            score=score,
            group=group,
            threshold=threshold,
        )
    removal, num_removal = _first_of_each_sign(_INFINITE_BITS - _bits(wanda), sign * ~mask, depth)
    return _swap(
        mask,
        contribution,
        error,
        limit,
        growth=growth,
        removal=removal.flip(1),  # what goes with a grown weight has the other sign
        available=torch.minimum(num_growth, num_removal.flip(1)),
        threshold=threshold,
        same_sign=same_sign,
    )


def check(*, max_cycles: int = 50, threshold: float = 0.1, variance_power: float = 1.0, swaps: float = 0.1) -> None:
    """Raise BadInput for settings out of range."""
    if max_cycles < 0:
        raise BadInput(f"--set refinement.max_cycles: {max_cycles} is not 0 or more")
    if not threshold >= 0:
        raise BadInput(f"--set refinement.threshold: {threshold} is not 0 or more")
    if not 0 <= variance_power < float("inf"):
        raise BadInput(f"--set refinement.variance_power: {variance_power} is not 0 or more and finite")
    if not 0 <= swaps <= 1:
        raise BadInput(f"--set refinement.swaps: {swaps} is not in [0, 1]")


def _bits(values: Float32[Tensor, "rows columns"]) -> Int32[Tensor, "rows columns"]:
    """Return integers in the order of `values`, which must not be negative."""
    return values.view(torch.int32)


def _first_of_each_sign(
    urgency: Int32[Tensor, "rows columns"], sign: Int8[Tensor, "rows columns"], depth: int
) -> tuple[Int64[Tensor, "rows 2 depth"], Int64[Tensor, "rows 2"]]:
    """Return the `depth` most urgent columns of each row with sign -1 and with sign 1, and the number of each.

    Beyond that number the columns are arbitrary. Tie rule: the lower column first; the column is part of the key, so
    that a partial sort is the same everywhere.
    """
    columns = urgency.shape[1]
    key = urgency.long()  # a copy, changed in place below: this is where most of the time goes
    key += 1
    key <<= 32
    key += torch.arange(columns - 1, -1, -1, device=urgency.device)
    key *= sign
    ends = [key.topk(depth, largest=largest) for largest in (False, True)]
    found = [(ends[0].values < 0).sum(dim=1), (ends[1].values > 0).sum(dim=1)]
    return torch.stack([end.indices for end in ends], dim=1), torch.stack(found, dim=1)


def _swap(
    mask: Bool[Tensor, "rows columns"],
    contribution: Float32[Tensor, "rows columns"],
    error: Float32[Tensor, " rows"],
    limit: Int64[Tensor, " rows"],
    *,
    growth: Int64[Tensor, "rows 2 depth"],
    removal: Int64[Tensor, "rows 2 depth"],
    available: Int64[Tensor, "rows 2"],
    threshold: float,
    same_sign: bool,
) -> Bool[Tensor, "rows columns"]:
    """Return `mask` after the swaps: the n-th swap of a row at one sign of its error is fixed from the start."""
    rows, depth = growth.shape[0], growth.shape[2]
    change = contribution.gather(1, removal.flatten(1)) - contribution.gather(1, growth.flatten(1))  # [rows, 2 * depth]
    error = error[:, None]  # [rows, 1]
    start = error.sign()
    active = torch.ones_like(error, dtype=torch.bool)
    done = torch.zeros_like(available)  # [rows, 2]
    for cycle in range(depth):
        side = torch.where(error > 0, _POSITIVE, _NEGATIVE)
        place = done.gather(1, side)
        after = error + change.gather(1, side * depth + place)
        active = active & (error.abs() > threshold) & (cycle < limit[:, None]) & (place < available.gather(1, side))
        if same_sign:
            active = active & (after.sign() == start)
        if not bool(active.any()):
            break
        error = torch.where(active, after, error)
        done.scatter_add_(1, side, active.long())
    moved = torch.arange(depth, device=mask.device) < done[:, :, None]  # [rows, 2, depth]
    flips = torch.zeros_like(mask, dtype=torch.int8)
    for columns in (growth, removal):  # beyond `available` a column may be in both lists, where nothing is added
        flips.scatter_add_(1, columns.reshape(rows, -1), moved.reshape(rows, -1).to(torch.int8))
    return mask ^ flips.bool()


def _swap_in_groups(
    mask: Bool[Tensor, "rows columns"],
    contribution: Float32[Tensor, "rows columns"],
    error: Float32[Tensor, " rows"],
    limit: Int64[Tensor, " rows"],
    *,
    growth: Int64[Tensor, "rows 2 depth"],
    num_growth: Int64[Tensor, "rows 2"],
    score: Float32[Tensor, "rows columns"],
    group: int,
    threshold: float,
) -> Bool[Tensor, "rows columns"]:
    """Return `mask` after swaps within aligned groups of inputs; a row's error keeps its sign, hence one list a row."""
    rows, columns = mask.shape
    row = torch.arange(rows, device=mask.device)
    start = error.sign()
    side = torch.where(error > 0, _POSITIVE, _NEGATIVE)
    growth, num_growth = growth[row, side], num_growth[row, side]  # [rows, depth], [rows]
    remaining = torch.where(mask, torch.inf, score).view(rows, columns // group, group)
    active = torch.ones_like(start, dtype=torch.bool)
    flips = torch.zeros_like(mask)
    for cycle in range(growth.shape[1]):
        active = active & (error.abs() > threshold) & (cycle < torch.minimum(limit, num_growth))
        if not bool(active.any()):
            break
        grown = growth[:, cycle]
        own = grown // group
        least = remaining[row, own].min(dim=1)  # [rows, group] -> [rows]; the first of equals
        gone = own * group + least.indices
        after = error + contribution[row, gone] - contribution[row, grown]
        possible = least.values < torch.inf
        active = active & (~possible | (after.sign() == start))
        swapped = active & possible
        error = torch.where(swapped, after, error)
        remaining[row, own, least.indices] = torch.where(swapped, torch.inf, least.values)
        flips[row, grown] |= swapped
        flips[row, gone] |= swapped
    return mask ^ flips


REFINEMENT = Refinement(refine=refine, statistic=Moments, check=check, released=True)
