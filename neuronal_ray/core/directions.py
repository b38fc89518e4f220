"""Search directions for the linears' rates, from the divergences measured after small changes of single cells."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from neuronal_ray.core.layout import Layout, Linear

_KNOTS = 4
_LEAST_GAIN = 0.05  # of the median gain: a cell that gains less, or loses, counts as this
_LARGEST_MOVE = 2.0  # times the mean move
_LEAST_CURVATURE = 0.3  # of the median curvature


@dataclass(frozen=True, eq=False)
class Cells:
    """The groups of linears whose rates move together: one kind (q, k, ..., down) in one run of neighboring blocks.

    `kind`, `sub_block` and `cell` hold the number of each linear's kind, of its sub-block within its run, and of its
    cell. `depth` holds the values of hat functions over the blocks, `sizes` the numbers of weights.
    """

    kind: Int64[Tensor, " linears"]
    sub_block: Int64[Tensor, " linears"]
    cell: Int64[Tensor, " linears"]
    depth: Float64[Tensor, "linears knots"]
    sizes: Float64[Tensor, " linears"]

    @classmethod
    def of(cls, layout: Layout, *, most: int, blocks: bool = True, parts: bool = True) -> "Cells":
        """Divide the linears into at most `most` cells, but at least one per kind.

        Without `parts` all linears count as one kind and sub-block; without `blocks` all blocks form one run.
        """
        specs, num_blocks = list(layout), layout.num_blocks
        kinds = _numbered([spec.kind if parts else "" for spec in specs])
        num_kinds = int(kinds.max()) + 1
        runs = min(num_blocks, max(1, most // num_kinds)) if blocks else 1
        block = torch.tensor([spec.linear.block for spec in specs])
        run = block * runs // num_blocks
        sub_block = _numbered([spec.sub_block if parts else "" for spec in specs])
        knots = min(num_blocks, _KNOTS) if blocks else 1
        place = block.double() * (knots - 1) / max(1, num_blocks - 1)
        depth = (1 - (place[:, None] - torch.arange(knots)).abs()).clamp(min=0) if knots > 1 else place[:, None] * 0
        return cls(
            kind=kinds,
            sub_block=sub_block + (int(sub_block.max()) + 1) * run,
            cell=_numbered(list(zip(kinds.tolist(), run.tolist(), strict=True))),
            depth=depth,
            sizes=torch.tensor([spec.size for spec in specs], dtype=torch.float64),
        )

    @cached_property
    def count(self) -> int:
        """Number of cells."""
        return int(self.cell.max()) + 1

    @cached_property
    def axes(self) -> Float64[Tensor, "axes linears"]:
        """The coarse directions: each kind (if there are several), then each knot of the depth."""
        num_kinds = int(self.kind.max()) + 1
        kinds = torch.nn.functional.one_hot(self.kind, num_kinds).double().t()  # [kinds, linears]
        depth = self.depth.t()
        rows = ([kinds] if num_kinds > 1 else []) + ([depth] if depth.shape[0] > 1 else [])
        return torch.cat(rows) if rows else torch.zeros(0, len(self.sizes), dtype=torch.float64)

    def members(self, layout: Layout) -> list[list[Linear]]:
        """List the linears of each cell."""
        members: list[list[Linear]] = [[] for _ in range(self.count)]
        for spec, cell in zip(layout, self.cell.tolist(), strict=True):
            members[cell].append(spec.linear)
        return members

    def mean(self, values: Float64[Tensor, " linears"], groups: Int64[Tensor, " linears"]) -> Tensor:
        """Return, for every linear, the mean of `values` over its group."""
        number = int(groups.max()) + 1
        sums = torch.zeros(number, dtype=torch.float64).index_add_(0, groups, values)
        counts = torch.zeros(number, dtype=torch.float64).index_add_(0, groups, torch.ones_like(values))
        return (sums / counts)[groups]


def _numbered(names: Sequence[object]) -> Int64[Tensor, " linears"]:
    """Return a number for each name, equal for equal names, in order of first occurrence."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([numbers[name] for name in names])


def fine_direction(
    cells: Cells, gains: Float64[Tensor, " cells"], *, pooled: float = 0.0
) -> Float64[Tensor, " linears"]:
    """Return moves of the linears' rates in [-1, 1]: down where an extra weight gains much, up where it gains little.

    `gains` is the decrease of ln KL per additional weight that a cell keeps. The moves are the negative logarithms of
    the gains, minus their mean over the weights, divided by their mean absolute value, and bounded. A share `pooled`
    of each logarithm is replaced by the value that its kind and sub-block explain, which averages out the noise of
    few sequences.
    """
    gains = gains.nan_to_num(nan=0.0, posinf=float(gains[gains.isfinite()].max()) if gains.isfinite().any() else 0.0)
    positive = gains[gains > 0]
    if not len(positive):
        return torch.zeros_like(cells.sizes)
    median = positive.median()
    logs = (gains.clamp(min=_LEAST_GAIN * float(median)) / median).log()[cells.cell]  # [cells] -> [linears]
    by_kind = cells.mean(logs, cells.kind)
    explained = by_kind + cells.mean(logs - by_kind, cells.sub_block)
    logs = (1 - pooled) * logs + pooled * explained
    logs = logs - (logs * cells.sizes).sum() / cells.sizes.sum()
    size = logs.abs().mean()
    return -(logs / size).clamp(-_LARGEST_MOVE, _LARGEST_MOVE) / _LARGEST_MOVE if size > 0 else logs


def coarse_direction(
    cells: Cells, here: float, ups: Sequence[float], downs: Sequence[float], *, step: float, largest: float
) -> Float64[Tensor, " linears"]:
    """Return the moves of the rates to the minimum of a parabola through three values of ln KL on each axis.

    `here` is KL without a move; `ups` and `downs` are KL with `step` more and less sparsity on each axis. Each move is
    bounded to `largest`. A curvature below 0.3 of the axes' median, or negative, is replaced by that bound.
    """
    if not len(ups):
        return torch.zeros_like(cells.sizes)
    above, below = (torch.tensor(values, dtype=torch.float64).log() for values in (ups, downs))
    slope = (above - below) / (2 * step)
    curvature = (above + below - 2 * math.log(here)) / step**2
    least = _LEAST_CURVATURE * float(curvature.nan_to_num(posinf=0.0).abs().median()) + 1e-6
    moves = (-slope / curvature.clamp(min=least)).nan_to_num(nan=0.0).clamp(-largest, largest)
    return moves @ cells.axes
