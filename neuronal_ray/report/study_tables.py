"""Which tables does a report over sweeps show? Numbers by row and column, the best and second best marked.

As the paper does, the best of the allocations is marked per method and column. Tables know nothing of HTML.
"""

import json
import math
import statistics
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from neuronal_ray.sweep.files import DENSE, Row

PUBLISHED = Path(__file__).parent / "published" / "neuronal.toml"
_LOWER_IS_BETTER = ("perplexity", "seconds")
_NOT_VARIED = ("seed", "sparsity", "method", "model", "calibration", "evaluate", "settings", "allocation", "output")


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One number as it is shown; `rank` 1 is the best of its group, 2 the second best, 0 neither."""

    value: float
    text: str
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """`rows` are the leading words of each line of `marks`; None is an empty cell."""

    title: str
    words: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marks: tuple[tuple[Mark | None, ...], ...]
    metric: str = ""
    sparsity: float | None = None
    note: str = ""


def shown(value: float, metric: str) -> str:
    """A number in the paper's notation: one decimal, 2.53e4 from 1000 on; accuracies in percent."""
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
    """1 for the best, 2 for the next best value, 0 for the others and where all are equal; equals share their rank."""
    known = sorted({value for value in values if value is not None and math.isfinite(value)})
    if len(known) < 2:
        return [0] * len(values)
    if metric not in _LOWER_IS_BETTER:
        known.reverse()
    return [known.index(value) + 1 if value in known[:2] else 0 for value in values]


def result_tables(rows: Sequence[Row]) -> list[Table]:
    """One table per sparsity and metric: methods and variants against models and evaluations; means over seeds."""
    tables = []
    kinds = sorted({(row.sparsity, row.metric == "perplexity") for row in rows if row.method != DENSE}, key=_kind)
    for sparsity, perplexity in kinds:
        mine = [row for row in rows if row.sparsity == sparsity and (row.metric == "perplexity") == perplexity]
        dense = [row for row in rows if row.method == DENSE and (row.metric == "perplexity") == perplexity]
        columns = list(dict.fromkeys((row.model, row.evaluation) for row in mine if row.method != DENSE))
        lines = _by_method((row.method, row.variant) for row in mine if row.method != DENSE)
        grid = [[_values(mine, method, variant, column) for column in columns] for method, variant in lines]
        metric = mine[-1].metric
        several = any(len(cell) > 1 for line in grid for cell in line)
        marks = _marked([line[0] for line in lines], [[_mean(cell) for cell in line] for line in grid], metric)
        marks = [
            tuple(_with_spread(mark, cell, metric) for mark, cell in zip(line, cells, strict=True))
            for line, cells in zip(marks, grid, strict=True)
        ]
        ours = [(DENSE, "")] if dense else []
        first = [tuple(_dense_mark(dense, column, metric) for column in columns)] if dense else []
        tables.append(
            Table(
                title=f"{metric.capitalize()} at {100 * sparsity:g} % sparsity" + ("" if perplexity else " (percent)"),
                words=("Method", "Top-up"),
                columns=tuple(f"{Path(model).name} {evaluation}" for model, evaluation in columns),
                rows=(*ours, *lines),
                marks=(*first, *marks),
                metric=metric,
                sparsity=sparsity,
                note="mean and standard deviation over seeds and calibration texts" if several else "",
            )
        )
    return tables


def _by_method(lines: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each line once, a method's together, in the order in which they came."""
    distinct = list(dict.fromkeys(lines))
    methods = list(dict.fromkeys(method for method, _ in distinct))
    return sorted(distinct, key=lambda line: methods.index(line[0]))


def _kind(kind: tuple[float, bool]) -> tuple[bool, float]:
    return not kind[1], kind[0]


def _values(rows: Iterable[Row], method: str, variant: str, column: tuple[str, str]) -> list[float]:
    return [
        math.inf if row.value is None else row.value
        for row in rows
        if (row.method, row.variant, row.model, row.evaluation) == (method, variant, *column)
    ]


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _marked(
    groups: Sequence[str], grid: Sequence[Sequence[float | None]], metric: str
) -> list[tuple[Mark | None, ...]]:
    """The grid with ranks per group of lines and column; a group of one line has nothing to rank."""
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


def _dense_mark(rows: Iterable[Row], column: tuple[str, str], metric: str) -> Mark | None:
    for row in rows:
        if (row.model, row.evaluation) == column and row.value is not None:
            return Mark(value=row.value, text=shown(row.value, metric))
    return None


def seconds_table(rows: Sequence[Row]) -> Table | None:
    """Seconds that each variant took to find its plan, the mean over cells (the paper's Table 7)."""
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
        note="refinement included; the method's own statistics and ranking left out, as in the paper",
    )


def lambda_table(rows: Sequence[Row]) -> Table | None:
    """The lambdas that NeuronAL selected (the paper's Tables 23 and 24)."""
    chosen = {row.cell: row for row in rows if row.block_lambda is not None or row.row_lambda is not None}.values()
    searched = [row for row in chosen if len(json.loads(row.config).get("block_lambdas", "many")) > 1]
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


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values against one option that varies: a sensitivity, or perplexity over lambda with the selected marked."""

    title: str
    option: str
    points: tuple[tuple[float, float], ...]
    selected: float | None


def curves(rows: Sequence[Row]) -> list[Curve]:
    """One curve for each option with at least three values among cells that are equal otherwise."""
    found = []
    pruned = [row for row in rows if row.method != DENSE and row.value is not None]
    numbers: dict[str, dict[str, Any]] = {row.cell: _numeric_options(row) for row in pruned}
    seen: dict[str, set[float]] = {}
    for options in numbers.values():
        for name, value in options.items():
            seen.setdefault(name, set()).add(value)
    for option in sorted({name for options in numbers.values() for name in options}):
        groups: dict[tuple[Any, ...], dict[float, list[float]]] = {}
        for row in pruned:
            if option not in numbers[row.cell]:
                continue
            rest = tuple(sorted((k, v) for k, v in numbers[row.cell].items() if k != option))
            key = (row.model, row.method, row.allocation, row.sparsity, row.evaluation, row.metric, rest)
            groups.setdefault(key, {}).setdefault(numbers[row.cell][option], []).append(row.value or math.nan)
        for (model, method, allocation, sparsity, evaluation, metric, rest), values in groups.items():
            if len(values) < 3:
                continue
            others = "".join(f", {name} {value:g}" for name, value in rest if len(seen[name]) > 1)
            title = (
                f"{Path(model).name}, {method}, {allocation} at {100 * sparsity:g} %{others}: {metric} on {evaluation}"
            )
            points = tuple((x, statistics.fmean(ys)) for x, ys in sorted(values.items()))
            selected = _selected(pruned, model, method, sparsity) if option == "block lambda" else None
            found.append(Curve(title=title, option=option, points=points, selected=selected))
    return found


def _numeric_options(row: Row) -> dict[str, float]:
    """Options of a cell that have one number: those whose effect can be drawn."""
    config = json.loads(row.config)
    found = {
        name.replace("_", " "): float(value)
        for name, value in config.items()
        if name not in _NOT_VARIED and isinstance(value, int | float) and not isinstance(value, bool)
    }
    found |= {
        name: float(value)
        for name, value in config.get("settings", {}).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if len(config.get("block_lambdas", ())) == 1:
        found["block lambda"] = config["block_lambdas"][0]
    return found


def _selected(rows: Iterable[Row], model: str, method: str, sparsity: float) -> float | None:
    """The block lambda that NeuronAL chose among all, where a cell of the sweep let it."""
    for row in rows:
        searched = len(json.loads(row.config).get("block_lambdas", "many")) > 1
        same = (row.model, row.method, row.sparsity) == (model, method, sparsity)
        if row.allocation == "neuronal" and searched and same:
            return row.block_lambda
    return None


def published_tables(numbers: Sequence[int], sparsities: Iterable[float]) -> list[Table]:
    """The paper's tables of those numbers, at those sparsities where a table has several."""
    if not numbers:
        return []
    wanted = set(sparsities)
    found = []
    for table in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["table"]:
        if table["number"] not in numbers or (wanted and table.get("sparsity", min(wanted)) not in wanted):
            continue
        found.append(_published(table))
    return found


def _published(table: Mapping[str, Any]) -> Table:
    width = len(table["rows"])
    rows = [tuple(map(str, line[:width])) for line in table["values"]]
    grid = [[None if isinstance(value, str) else float(value) for value in line[width:]] for line in table["values"]]
    metric = table["metric"]
    place = table["rows"].index("allocation") if "allocation" in table["rows"] else None
    groups = [" ".join(word for number, word in enumerate(row) if number != place) for row in rows]
    lines = _marked(groups if place is not None else [str(number) for number in range(len(rows))], grid, metric)
    marks = tuple(
        tuple(None if mark is None else replace(mark, text=_printed(mark.value)) for mark in line) for line in lines
    )
    at = f" at {100 * table['sparsity']:g} %" if "sparsity" in table else ""
    return Table(
        title=f"The paper's Table {table['number']}{at}: {table['title']}",
        words=tuple(word.capitalize() for word in table["rows"]),
        columns=tuple(" ".join(filter(None, column)) for column in table["columns"]),
        rows=tuple(rows),
        marks=marks,
        metric=metric,
        sparsity=table.get("sparsity"),
        note="; ".join(table.get("notes", ())),
    )


def _printed(value: float) -> str:
    """As the paper prints it."""
    if math.isnan(value):
        return "-"
    return f"{value:.2e}".replace("e+0", "e") if abs(value) >= 1e4 else f"{value:g}"
