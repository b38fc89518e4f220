"""How do time and memory grow? Fitted exponents beside the floor's, as a table and as plots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MIB = 2**20
_INK, _MUTED, _LINE, _SPARSER = "#23262b", "#686e76", "#dcdee1", "#b9582c"


@dataclass(frozen=True, kw_only=True)
class Series:
    """Seconds of a search and of its floor, and bytes held, at each value of `name`, all else equal."""

    name: str
    values: tuple[int, ...]
    search_s: tuple[float, ...]
    floor_s: tuple[float, ...]
    num_bytes: tuple[int, ...]

    @property
    def search_slope(self) -> float:
        """p of search_s ~ value ** p."""
        return slope(self.values, self.search_s)

    @property
    def floor_slope(self) -> float:
        """The same of the floor."""
        return slope(self.values, self.floor_s)

    @property
    def bytes_slope(self) -> float:
        """The same of the bytes."""
        return slope(self.values, self.num_bytes)


def slope(values: Sequence[float], results: Sequence[float]) -> float:
    """The exponent p of the best fit results ~ values ** p: least squares on logarithms."""
    xs, ys = [math.log(value) for value in values], [math.log(result) for result in results]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    return covariance / sum((x - mean_x) ** 2 for x in xs)


def growth_table(series: Sequence[Series]) -> list[str]:
    """In Markdown; the last column but one of each row has the exponents of search, floor and memory."""
    rows = [
        "| against | values | search | floor | memory | exponents: search, floor, memory |",
        "|---|---|---|---|---|---|",
    ]
    for one in series:
        cells = (
            one.name,
            ", ".join(f"{value}" for value in one.values),
            ", ".join(f"{spent:.2f}" for spent in one.search_s) + " s",
            ", ".join(f"{spent:.2f}" for spent in one.floor_s) + " s",
            ", ".join(f"{size / _MIB:.0f}" for size in one.num_bytes) + " MiB",
            f"{one.search_slope:.2f}, {one.floor_slope:.2f}, {one.bytes_slope:.2f}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def write_growth_plots(series: Sequence[Series], folder: Path) -> list[Path]:
    """growth.svg and growth.png: time above memory, a column for each series, both axes logarithmic."""
    import matplotlib.style
    from matplotlib.figure import Figure

    ours = {
        "svg.hashsalt": "neuronal_ray",
        "font.size": 9,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _MUTED,
        "xtick.color": _MUTED,
        "ytick.color": _MUTED,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    paths = [folder / "growth.svg", folder / "growth.png"]
    with matplotlib.style.context(["default", ours]):
        figure = Figure(figsize=(2.6 * len(series), 5), facecolor="white", layout="constrained")
        axes = figure.subplots(2, len(series), squeeze=False, sharex="col")
        for column, one in enumerate(series):
            above, below = axes[0][column], axes[1][column]
            above.plot(one.values, one.search_s, "o-", color=_SPARSER, ms=4, label="search")
            above.plot(one.values, one.floor_s, "o--", color=_MUTED, ms=4, label="forwards alone")
            above.set_title(f"slopes {one.search_slope:.2f} and {one.floor_slope:.2f}", fontsize=9, color=_INK)
            below.plot(one.values, [size / _MIB for size in one.num_bytes], "o-", color=_SPARSER, ms=4)
            below.set_title(f"slope {one.bytes_slope:.2f}", fontsize=9, color=_INK)
            below.set_xlabel(one.name)
            _plain_ticks(above, one.values)
            _plain_ticks(below, one.values)
        axes[0][0].set_ylabel("seconds")
        axes[1][0].set_ylabel("MiB")
        axes[0][0].legend(frameon=False)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {}
            figure.savefig(path, dpi=150, metadata=metadata)
    return paths


def _plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    """Logarithmic axes, the values themselves as marks."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(values), [f"{value}" for value in values])
    axes.minorticks_off()
