"""TRIM: redistribution of one linear's removed weights over its rows, at the same total.

Beck et al., TRIM: Achieving Extreme Sparsity with Targeted Row-wise Iterative Metric-driven Pruning, 2025
(arXiv 2505.16743).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64, Int, Int32
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.masking import zero_lowest
from neuronal_ray.core.plan import largest_remainder, water_level

WIDTHS = (0.01, 0.02, 0.04, 0.08, 0.12, 0.16)
REVERSED_WIDTHS = (0.01, 0.02, 0.04)

_FLATTEST = 1e-6  # the released code's: differences of cosines below this have hardly any effect
_COUNT_DECIMALS = 6


@dataclass(frozen=True, eq=False)
class Similarity:
    """Cosine similarity of a linear's dense and pruned outputs over the tokens: by row, and of all rows at once."""

    rows: Float64[Tensor, " rows"]
    whole: float


@dataclass(frozen=True, eq=False)
class Trimmed:
    """Removed weights of each row, and the resulting similarity of the outputs."""

    removed: Int32[Tensor, " rows"]
    similarity: Similarity


Judge = Callable[[Int32[Tensor, " rows"]], Similarity]


def trim_rows(
    weight: Float[Tensor, "rows columns"],
    gram: Float32[Tensor, "columns columns"],
    ranks: Int[Tensor, "rows columns"],
    removed: Int32[Tensor, " rows"],
    *,
    widths: Sequence[float] = WIDTHS,
    reversed_widths: Sequence[float] = REVERSED_WIDTHS,
    iterations: int = 10,
    highest: float = 0.95,
) -> Float64[Tensor, " rows"]:
    """Return row rates, on the host, that remove `removed.sum()` weights and keep the outputs closest to the dense.

    `removed` is the starting point, `ranks` the ranking (masks.rank_rows), `gram` the sum over tokens of the inputs'
    outer products: every cosine is a quadratic form in it, so the tokens are not needed. A rate times the columns is
    an integer. Each width restarts from `removed` and takes `iterations` steps; of all trials, the start included,
    the highest cosine of the flattened outputs wins, the first of equals. Widths increase until one is no better than
    the one before; if none of them helps, the reversed widths (aligned rows become denser) are tried.

    No row loses more than floor(highest * columns) weights or, if that is more, than the sparsest row of the start:
    a start above `highest` remains possible, and a uniform one is returned as it is.
    Differs: the released code shifts the rates to the mean after bounding them, so that they exceed the bounds again,
    and floors each row; here the shift is bounded and the counts are exact in every trial.
    """
    if not all(width > 0 for width in (*widths, *reversed_widths)):
        raise BadInput(f"trim: widths are {(*widths, *reversed_widths)}, expected numbers above 0")
    if iterations < 1:
        raise BadInput(f"trim: iterations is {iterations}, expected 1 or more")
    if not 0 < highest <= 1:
        raise BadInput(f"trim: highest is {highest}, expected a rate above 0 and up to 1")
    columns = weight.shape[1]
    removed = removed.cpu()
    most = max(math.floor(highest * columns), int(removed.max()))
    if int(removed.sum()) in (0, most * len(removed)):  # no weight can move from one row to another
        return removed.double() / columns
    weight = weight.float()
    dense = weight @ gram  # [rows, columns]
    energy = _energy(dense, weight)

    def judge(counts: Int32[Tensor, " rows"]) -> Similarity:
        return similarity(dense, energy, zero_lowest(weight, ranks, counts), gram)

    start = Trimmed(removed, judge(removed))
    if not math.isfinite(start.similarity.whole):
        raise BadInput("--model: NaN or infinite activations, rows cannot be compared")
    best = _best_of(judge, start, widths, columns=columns, most=most, iterations=iterations)
    if best is start:
        opposite = [-width for width in reversed_widths]
        best = _best_of(judge, start, opposite, columns=columns, most=most, iterations=iterations)
    return best.removed.double() / columns


def similarity(
    dense: Float32[Tensor, "rows columns"],
    energy: Float64[Tensor, " rows"],
    pruned: Float32[Tensor, "rows columns"],
    gram: Float32[Tensor, "columns columns"],
) -> Similarity:
    """Return the cosines of w_i x and v_i x over the tokens x, for rows v_i of `pruned`.

    `dense` is W G and `energy` holds each w_i G w_i. As <w_i x, v_i x> = w_i G v_i and |v_i x|^2 = v_i G v_i, one
    product with G suffices. The cosine of two zero outputs is 1, that of one zero output is 0. Rows are summed in
    float32, the rows' sums in float64.
    """
    dots = (dense * pruned).sum(dim=1).double().cpu()  # [rows, columns] -> [rows]
    pruned_energy = _energy(pruned @ gram, pruned)
    whole = _cosine(dots.sum(), energy.sum(), pruned_energy.sum())
    return Similarity(_cosine(dots, energy, pruned_energy), float(whole))


def _energy(
    product: Float32[Tensor, "rows columns"], weight: Float32[Tensor, "rows columns"]
) -> Float64[Tensor, " rows"]:
    """Return each row's sum of squared outputs, from `product` = weight @ gram, never negative despite rounding."""
    return (product * weight).sum(dim=1).double().cpu().clamp(min=0)  # [rows, columns] -> [rows]


def _cosine(
    dots: Float64[Tensor, " *rows"], one: Float64[Tensor, " *rows"], other: Float64[Tensor, " *rows"]
) -> Float64[Tensor, " *rows"]:
    """Compute cosines from inner products and squared norms."""
    norms = (one * other).sqrt()
    cosines = (dots / norms).clamp(-1, 1).where(norms != 0, 0.0)
    return cosines.where((one != 0) | (other != 0), 1.0)


def _best_of(
    judge: Judge, start: Trimmed, widths: Sequence[float], *, columns: int, most: int, iterations: int
) -> Trimmed:
    """Return the best result of the widths, or `start` itself when none is better."""
    best, reached = start, -math.inf
    for width in widths:
        trimmed = _follow(judge, start, width, columns=columns, most=most, iterations=iterations)
        if trimmed.similarity.whole > best.similarity.whole:
            best = trimmed
        if trimmed.similarity.whole <= reached:
            break
        reached = trimmed.similarity.whole
    return best


def _follow(judge: Judge, start: Trimmed, width: float, *, columns: int, most: int, iterations: int) -> Trimmed:
    """Return the best of `start` and the steps of one width from there."""
    best, here = start, start
    rates = start.removed.double() / columns
    total = int(start.removed.sum())
    for _ in range(iterations):
        moved = (rates + _step(here.similarity.rows, width)).clamp(0.0, most / columns)
        # `water_level` bounds to [0, 1]: in units of `most` weights that is [0, most].
        level = water_level(moved * (columns / most), torch.full_like(moved, float(most)), float(total)) * most
        rates = level / columns
        counts = largest_remainder(level, total, decimals=_COUNT_DECIMALS).int()
        here = Trimmed(counts, judge(counts))
        if here.similarity.whole > best.similarity.whole:
            best = here
    return best


def _step(cosines: Float64[Tensor, " rows"], width: float) -> Float64[Tensor, " rows"]:
    """Scale the cosines to [0, 2 * width] and subtract their mean: rows that are still aligned become sparser."""
    low, high = cosines.min(), cosines.max()
    scaled = (cosines - low) / (high - low + _FLATTEST) * (2 * width)
    return scaled - scaled.mean()
