"""Curves of a report on sweeps: results against an option that varies while all others are equal."""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronal_ray.report.schemas import DENSE, Result
from neuronal_ray.report.study_tables import in_title, searched_lambdas

_NOT_VARIED = ("seed", "sparsity", "method", "model", "calibration", "evaluate", "settings", "allocation", "output")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Values against one option that varies, for example perplexity against lambda; `selected` is marked."""

    title: str
    option: str
    points: tuple[tuple[float, float], ...]
    selected: float | None


def curves(rows: Sequence[Result]) -> list[Curve]:
    """Return a curve for each option that has at least three values among cells that are equal otherwise."""
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
            key = (row.model, row.method, row.allocation, row.sparsity, row.evaluation, row.metric, row.start, rest)
            groups.setdefault(key, {}).setdefault(numbers[row.cell][option], []).append(row.value or math.nan)
        for (model, method, allocation, sparsity, evaluation, metric, start, rest), values in groups.items():
            if len(values) < 3:
                continue
            others = "".join(f", {name} {value:g}" for name, value in rest if len(seen[name]) > 1)
            title = (
                f"{Path(model).name}, {method}, {allocation} at {100 * sparsity:g} %{others}: {metric} on {evaluation}"
                f"{in_title(start)}"
            )
            points = tuple((x, statistics.fmean(ys)) for x, ys in sorted(values.items()))
            selected = _selected(pruned, model, method, sparsity) if option == "block lambda" else None
            found.append(Curve(title=title, option=option, points=points, selected=selected))
    return found


def _numeric_options(row: Result) -> dict[str, float]:
    """Return the options of a cell that are one number: those whose effect can be drawn."""
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


def _selected(rows: Iterable[Result], model: str, method: str, sparsity: float) -> float | None:
    """Return the block lambda that another cell of the sweep selected among several."""
    for row in rows:
        if searched_lambdas(row) and (row.model, row.method, row.sparsity) == (model, method, sparsity):
            return row.block_lambda
    return None
