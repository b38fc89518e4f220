"""The tables of a report on sweeps: results, seconds and selected lambdas, as numbers without HTML.

As in the paper, the best and the second best top-up are marked per method and column.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from neuronal_ray.report.schemas import DENSE, Result

_MEANS = "mean and standard deviation over seeds and calibration texts"
_LOWER_IS_BETTER = ("perplexity", "seconds")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One number as it is shown; `rank` 1 is the best of its group, 2 the second best, 0 neither."""

    value: float
    text: str
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """`rows` are the leading words of each line of `marks`; None is an empty cell.

    `start` is how the windows of perplexities begin, "" for other metrics.
    """

    title: str
    words: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[tuple[Mark | None, ...], ...]
    metric: str = ""
    start: str = ""
    sparsity: float | None = None
    note: str = ""


def shown(value: float, metric: str) -> str:
    """Format a number as the paper does: perplexities of 1000 and more as 2.53e4, accuracies in percent."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "overflow"
    if metric == "perplexity":
        return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.2e}".replace("e+0", "e")
    if metric in ("accuracy", "acc"):
        return f"{100 * value:.2f}"
    return f"{value:g}"


def ranked(values: Sequence[float | None], metric: str) -> list[int]:
    """Return 1 for the best value, 2 for the next best, 0 for the others or if all are equal; equals share a rank."""
    known = sorted({value for value in values if value is not None and math.isfinite(value)})
    if len(known) < 2:
        return [0] * len(values)
    if metric not in _LOWER_IS_BETTER:
        known.reverse()
    return [known.index(value) + 1 if value in known[:2] else 0 for value in values]


def result_tables(rows: Sequence[Result]) -> list[Table]:
    """Return a table per sparsity, metric and window start: methods and variants against models and evaluations.

    Values are means over seeds.
    """
    tables = []
    kinds = sorted({(row.sparsity, row.start) for row in rows if row.method != DENSE}, key=_kind)
    for sparsity, start in kinds:
        mine = [row for row in rows if (row.sparsity, row.start) == (sparsity, start)]
        dense = [row for row in rows if (row.method, row.start) == (DENSE, start)]
        columns = list(dict.fromkeys((row.model, row.evaluation) for row in mine if row.method != DENSE))
        lines = _by_method((row.method, row.variant) for row in mine if row.method != DENSE)
        grid = [[_values(mine, method, variant, column) for column in columns] for method, variant in lines]
        metric = mine[-1].metric
        several = any(len(cell) > 1 for line in grid for cell in line)
        marks = marked([line[0] for line in lines], [[_mean(cell) for cell in line] for line in grid], metric)
        marks = [
            tuple(_with_spread(mark, cell, metric) for mark, cell in zip(line, cells, strict=True))
            for line, cells in zip(marks, grid, strict=True)
        ]
        ours = [(DENSE, "")] if dense else []
        first = [tuple(_dense_mark(dense, column, metric) for column in columns)] if dense else []
        tables.append(
            Table(
                title=f"{metric.capitalize()} at {100 * sparsity:g} % sparsity{in_title(start) or ' (percent)'}",
                words=("Method", "Top-up"),
                columns=tuple(f"{Path(model).name} {evaluation}" for model, evaluation in columns),
                rows=(*ours, *lines),
                marks=(*first, *marks),
                metric=metric,
                start=start,
                sparsity=sparsity,
                note="; ".join(filter(None, (_MEANS if several else "", _drift(mine)))),
            )
        )
    return tables


def _drift(rows: Iterable[Result]) -> str:
    """Return the range of sparsities that were achieved, if some differ from the target by 0.01 points or more."""
    pruned = [row for row in rows if row.method != DENSE]
    if all(abs(row.achieved - row.sparsity) < 1e-4 for row in pruned):
        return ""
    return f"achieved: {min(row.achieved for row in pruned):.2%} to {max(row.achieved for row in pruned):.2%}"


def _by_method(lines: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return each line once, those of a method together, in the order in which they came."""
    distinct = list(dict.fromkeys(lines))
    methods = list(dict.fromkeys(method for method, _ in distinct))
    return sorted(distinct, key=lambda line: methods.index(line[0]))


def _kind(kind: tuple[float, str]) -> tuple[bool, float, str]:
    """Order tables: perplexity first, then by sparsity, then the papers' windows last."""
    sparsity, start = kind
    return start == "", sparsity, start


def in_title(start: str) -> str:
    """Return how windows begin, for a title; "" for a metric that has none."""
    return f", window start {start}" if start else ""


def _values(rows: Iterable[Result], method: str, variant: str, column: tuple[str, str]) -> list[float]:
    return [
        math.inf if row.value is None else row.value
        for row in rows
        if (row.method, row.variant, row.model, row.evaluation) == (method, variant, *column)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def marked(groups: Sequence[str], grid: Sequence[Sequence[float | None]], metric: str) -> list[tuple[Mark | None, ...]]:
    """Return the grid with ranks per column and group of lines; a group of one line is not ranked."""
    ranks = [[0] * len(line) for line in grid]
    for group in dict.fromkeys(groups):
        members = [number for number, name in enumerate(groups) if name == group]
        if len(members) < 2:
            continue
        for column in range(len(grid[0])):
            for number, rank in zip(members, ranked([grid[n][column] for n in members], metric), strict=True):
                ranks[number][column] = rank
    return [
        tuple(
            None if value is None else Mark(value=value, text=shown(value, metric), rank=rank)
            for value, rank in zip(line, places, strict=True)
        )
        for line, places in zip(grid, ranks, strict=True)
    ]


def _with_spread(mark: Mark | None, values: Sequence[float], metric: str) -> Mark | None:
    if mark is None or len(values) < 2 or not all(map(math.isfinite, values)):
        return mark
    deviation = shown(statistics.stdev(values), metric)
    return Mark(value=mark.value, text=f"{mark.text} \u00b1 {deviation}", rank=mark.rank)


def _dense_mark(rows: Iterable[Result], column: tuple[str, str], metric: str) -> Mark | None:
    for row in rows:
        if (row.model, row.evaluation) == column and row.value is not None:
            return Mark(value=row.value, text=shown(row.value, metric))
    return None


def seconds_table(rows: Sequence[Result]) -> Table | None:
    """Return the seconds that each variant took to find its plan, the mean over cells (the paper's Table 7)."""
    pruned = {row.cell: row for row in rows if row.method != DENSE}.values()
    models = list(dict.fromkeys(row.model for row in pruned))
    lines = _by_method((row.method, row.variant) for row in pruned)
    if not lines:
        return None
    grid = [
        [
            _mean([row.seconds for row in pruned if (row.method, row.variant, row.model) == (*line, model)])
            for model in models
        ]
        for line in lines
    ]
    marks = tuple(
        tuple(None if value is None else Mark(value=value, text=f"{value:.1f}") for value in line) for line in grid
    )
    return Table(
        title="Seconds to find the allocation",
        words=("Method", "Top-up"),
        columns=tuple(Path(model).name for model in models),
        rows=tuple(lines),
        marks=marks,
        note="with the refinement, without the method's own statistics and ranking, as in the paper",
    )


def searched_lambdas(result: Result) -> bool:
    """Tell whether a cell selected its block lambda among several."""
    return result.block_lambda is not None and len(json.loads(result.config).get("block_lambdas", "many")) > 1


def lambda_table(rows: Sequence[Result]) -> Table | None:
    """Return the lambdas that searches of more than one selected (the paper's Tables 23 and 24)."""
    chosen = {row.cell: row for row in rows if row.block_lambda is not None or row.row_lambda is not None}.values()
    searched = [row for row in chosen if searched_lambdas(row)]
    models = list(dict.fromkeys(row.model for row in searched))
    lines = sorted({(f"{100 * row.sparsity:g} %", row.method, row.variant, str(row.seed)) for row in searched})
    if not lines:
        return None
    found = {(f"{100 * row.sparsity:g} %", row.method, row.variant, str(row.seed), row.model): row for row in searched}
    marks = []
    for line in lines:
        cells = []
        for model in models:
            row = found.get((*line, model))
            for lam in (None, None) if row is None else (row.block_lambda, row.row_lambda):
                cells.append(None if lam is None else Mark(value=lam, text=f"{lam:.2f}"))
        marks.append(tuple(cells))
    return Table(
        title="\u03bb selected, blocks and rows",
        words=("Sparsity", "Method", "Top-up", "Seed"),
        columns=tuple(f"{Path(model).name} {step}" for model in models for step in ("block", "row")),
        rows=tuple(lines),
        marks=tuple(marks),
    )
