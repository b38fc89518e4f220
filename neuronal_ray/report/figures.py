"""The figures of reports, drawn by matplotlib as inline SVG.

Orange is sparser than the target, blue is denser, and the target itself has no color. Colors are written as CSS
variables, so that the page decides how they look on a light screen, on a dark one and in print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neuronal_ray.report.html import Html, fill
from neuronal_ray.report.inputs import LinearSparsity, SearchStep
from neuronal_ray.report.style import Color

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from neuronal_ray.report.curves import Curve

PIXEL = 1 / 72  # inches: the SVG's user unit is a point, and the page shows it as one CSS pixel
MIN_SPREAD = 0.01  # a color scale narrower than this would make rounding look like structure
GRID_LEVELS = 17  # odd, so that the target has a level of its own; over 50 matplotlib would rasterize the scale
MAX_ROW_BINS = 61


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """The place of a figure: `key` makes its ids unique, `width` is in CSS pixels, `label` is for screen readers."""

    key: str
    width: int
    label: str

    def __post_init__(self) -> None:
        assert re.fullmatch(r"[0-9a-z-]+", self.key), f"{self.key!r} is no part of an id: never a name from a file"


def symbol_of(noun: str) -> str:
    """Return what a figure calls the quantity that candidates vary: its letter, where it has one."""
    return {"lambda": "\N{GREEK SMALL LETTER LAMDA}"}.get(noun, noun)


def search_figure(step: SearchStep, canvas: Canvas) -> Html:
    """Draw the scores of a step's candidates against what they vary, the selected candidate marked."""
    candidates = sorted(step.candidates, key=lambda candidate: candidate.lam)
    chosen = step.selected
    with _style():
        figure = _figure(canvas, height=220)
        axes = figure.add_subplot()
        lams = [candidate.lam for candidate in candidates]
        axes.plot(lams, [candidate.score for candidate in candidates], "o-", color=Color.MUTED, ms=3.5, lw=1)
        axes.plot([chosen.lam], [chosen.score], "o", color=Color.INK, ms=8)
        name = symbol_of(step.noun)
        axes.annotate(
            f"{chosen.lam:g}" if step.noun == "candidate" else f"{name} = {chosen.lam:g}",
            (chosen.lam, chosen.score),
            (0, -20),
            textcoords="offset points",
            ha="center",
            color=Color.INK,
        )
        axes.margins(x=0.12, y=0.12)
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom - 0.16 * (top - bottom), top)  # room for the label below the minimum
        axes.locator_params(nbins=5)
        axes.ticklabel_format(useOffset=False)
        axes.set_xlabel(name)
        axes.set_ylabel(chosen.criterion)
        return _svg(figure, canvas)


def curve_figure(curve: Curve, canvas: Canvas) -> Html:
    """Draw values against the one option that varies, the value that a search selected marked."""
    with _style():
        figure = _figure(canvas, height=200)
        axes = figure.add_subplot()
        xs, ys = [x for x, _ in curve.points], [y for _, y in curve.points]
        axes.plot(xs, ys, "o-", color=Color.MUTED, ms=3.5, lw=1)
        for x, y in curve.points:
            if x == curve.selected:
                axes.plot([x], [y], "o", color=Color.SPARSER, ms=8)
        if max(ys) > 10 * min(ys) > 0:
            axes.set_yscale("log")
        axes.margins(x=0.06, y=0.12)
        axes.set_xlabel(curve.option)
        return _svg(figure, canvas)


def runtime_figure(points: Sequence[tuple[str, float, float]], canvas: Canvas) -> Html:
    """Draw perplexity against seconds, a named dot for each (name, seconds, perplexity); lower left is better."""
    with _style():
        figure = _figure(canvas, height=240)
        axes = figure.add_subplot()
        for name, seconds, value in points:
            axes.plot([max(seconds, 1e-3)], [value], "o", color=Color.DENSER, ms=6)
            axes.annotate(
                name, (max(seconds, 1e-3), value), (5, 4), textcoords="offset points", color=Color.INK, size=9
            )
        axes.set_xscale("log")
        values = [value for _, _, value in points]
        if max(values) > 10 * min(values) > 0:
            axes.set_yscale("log")
        axes.margins(x=0.25, y=0.15)
        axes.set_xlabel("seconds")
        axes.set_ylabel("perplexity")
        return _svg(figure, canvas)


def block_figure(linears: Sequence[LinearSparsity], canvas: Canvas, *, target: float) -> Html:
    """Draw the sparsity per block above a grid of the sparsity per block and linear."""
    import numpy as np
    from matplotlib.colors import ListedColormap, to_rgba
    from matplotlib.ticker import MaxNLocator

    paths = list(dict.fromkeys(linear.path for linear in linears))
    first, last = min(linear.block for linear in linears), max(linear.block for linear in linears)
    pruned = np.zeros((len(paths), last - first + 1))
    weights = np.zeros_like(pruned)
    for linear in linears:
        cell = paths.index(linear.path), linear.block - first
        pruned[cell] += linear.pruned
        weights[cell] += linear.weights
    grid = np.ma.masked_invalid(np.divide(pruned, weights, out=np.full_like(pruned, np.nan), where=weights > 0))
    blocks = np.arange(first, last + 1)
    per_block = pruned.sum(axis=0) / np.maximum(weights.sum(axis=0), 1)  # [blocks]
    seen = weights.sum(axis=0) > 0
    spread = max(float(np.abs(grid - target).max()), MIN_SPREAD)
    ramp = np.linspace(-1, 1, GRID_LEVELS)
    colors = [to_rgba(Color.SPARSER if level > 0 else Color.DENSER, abs(level)) for level in ramp]

    with _style():
        figure = _figure(canvas, height=205 + 19 * len(paths))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[120, 19 * len(paths)])
        for x, rate in zip(blocks[seen], per_block[seen], strict=True):
            color = Color.SPARSER if rate > target else Color.DENSER
            top.bar(x, rate - target, bottom=target, width=0.72, color=color, alpha=0.75, lw=0)
        top.hlines(per_block[seen], blocks[seen] - 0.36, blocks[seen] + 0.36, color=Color.INK, lw=1.2)
        reach = max(float(np.abs(per_block[seen] - target).max()), MIN_SPREAD) * 1.15
        top.set_ylim(target - reach, target + reach)
        top.axhline(target, color=Color.INK, lw=0.8, ls=(0, (4, 3)))
        top.yaxis.set_major_formatter(_percent)
        top.yaxis.set_major_locator(MaxNLocator(5))
        top.set_ylabel("sparsity")
        top.tick_params(axis="x", length=0, labelbottom=False)
        top.spines["bottom"].set_visible(False)

        edges = np.arange(first, last + 2) - 0.5
        mesh = bottom.pcolormesh(edges, np.arange(len(paths) + 1) - 0.5, grid, cmap=ListedColormap(colors))
        mesh.set_clim(target - spread, target + spread)
        mesh.set(edgecolor=Color.LINE, linewidth=0.5)
        bottom.set_yticks(range(len(paths)), paths)
        bottom.invert_yaxis()
        bottom.xaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        bottom.set_xlabel("block")
        bottom.tick_params(length=0)
        bottom.spines[:].set_visible(False)

        ends = [target - spread, target, target + spread]
        scale = figure.colorbar(mesh, ax=bottom, orientation="horizontal", ticks=ends, aspect=28, shrink=0.5)
        scale.set_ticklabels([f"-{100 * spread:.1f}", "target", f"+{100 * spread:.1f} points"])
        scale.outline.set_visible(False)
        scale.ax.tick_params(length=0)
        return _svg(figure, canvas)


def row_figure(linears: Sequence[LinearSparsity], canvas: Canvas, *, target: float) -> Html:
    """Draw the distribution of the sparsity of all output rows, a ridge per path, each scaled to its own peak."""
    import numpy as np

    rates: dict[str, list[NDArray[np.float64]]] = {}
    columns: dict[str, set[int]] = {}
    for linear in linears:
        rates.setdefault(linear.path, []).append(linear.row_pruned / linear.columns)
        columns.setdefault(linear.path, set()).add(linear.columns)
    ridges = {path: np.concatenate(parts) for path, parts in rates.items()}
    low = min(float(ridge.min()) for ridge in ridges.values())
    high = max(float(ridge.max()) for ridge in ridges.values())
    spread = max(target - low, high - target, MIN_SPREAD) * (1 + 1e-9)  # the outermost rows stay inside
    coarsest = min(min(widths) for widths in columns.values())
    middle = max(1, min(MAX_ROW_BINS, int(spread * coarsest)) // 2)
    edges = target + spread * np.linspace(-1, 1, 2 * middle + 2)

    with _style():
        figure = _figure(canvas, height=60 + 30 * len(ridges))
        axes = figure.add_subplot()
        for line, (path, values) in enumerate(ridges.items()):
            heights = np.histogram(values, edges)[0] / _possible(columns[path], edges)
            heights *= 0.82 / heights.max()
            for first, last, color in (
                (0, middle, Color.DENSER),
                (middle, middle + 1, Color.MUTED),  # holds the target
                (middle + 1, len(heights), Color.SPARSER),
            ):
                ridge, span = heights[first:last] - line, edges[first : last + 1]
                axes.stairs(ridge, span, baseline=-line, fill=True, color=color, alpha=0.75, lw=0)
            axes.axhline(-line, color=Color.LINE, lw=0.8, zorder=0)
        axes.axvline(target, color=Color.INK, lw=0.8, ls=(0, (4, 3)))
        axes.set_yticks([0.25 - line for line in range(len(ridges))], list(ridges))
        axes.set_ylim(-len(ridges) + 0.9, 1)
        margin = 0.04 * (max(high, target) - min(low, target)) + 0.1 * MIN_SPREAD
        axes.set_xlim(min(low, target) - margin, max(high, target) + margin)
        axes.xaxis.set_major_formatter(_percent)
        axes.locator_params(axis="x", nbins=7)
        axes.set_xlabel("sparsity of an output row")
        axes.tick_params(axis="y", length=0)
        axes.spines[["left", "bottom"]].set_visible(False)
        return _svg(figure, canvas)


def _possible(columns: set[int], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many rates a row can have in each bin, at least 1.

    Rows lose whole weights: without this weighting, bins and rates would interfere.
    """
    import numpy as np

    rates = np.concatenate([np.arange(width + 1) / width for width in sorted(columns)])
    possible: NDArray[np.float64] = np.maximum(np.histogram(rates, edges)[0], 1).astype(np.float64)
    return possible


def _percent(rate: float, position: float) -> str:
    return f"{round(100 * rate, 6):g}%"


@contextmanager
def _style() -> Iterator[None]:
    """Use matplotlib's defaults and ours on top, whatever the user's matplotlibrc says, until the context ends."""
    import matplotlib.style

    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": "neuronal_ray",
        "text.parse_math": False,  # names may have dollar signs
        "font.size": 11,
        "axes.labelsize": 11,
        "text.color": Color.INK,
        "axes.labelcolor": Color.MUTED,
        "axes.edgecolor": Color.LINE,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": Color.LINE,
        "ytick.color": Color.LINE,
        "xtick.labelcolor": Color.MUTED,
        "ytick.labelcolor": Color.MUTED,
    }
    with matplotlib.style.context(["default", ours]):
        yield


def _figure(canvas: Canvas, *, height: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(canvas.width * PIXEL, height * PIXEL), facecolor="none", layout="constrained")


def _svg(figure: Figure, canvas: Canvas) -> Html:
    """Return the figure as an inline `<svg>`: no prolog, no metadata, ids of its own, colors as CSS variables."""
    for axes in figure.axes:
        axes.set_facecolor("none")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = re.sub("<[^>]*>", lambda tag: _rewritten(tag[0], canvas.key), text[text.index("<svg") :])
    return Html(text.replace("<svg ", fill('<svg role="img" aria-label="{label}" ', label=canvas.label), 1))


def _rewritten(tag: str, key: str) -> str:
    """Return a tag of a figure with ids of its own, and with colors as CSS variables; text between tags stays."""
    tag = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{key}-", tag)
    for color in Color:
        tag = tag.replace(color.value, f"var(--{color.name.lower()})")
    return tag
