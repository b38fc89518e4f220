"""The paper's own tables, from published/neuronal.toml, in the form of a report's tables."""

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neuronal_ray.report.study_tables import Table, marked

PUBLISHED = Path(__file__).parent / "published" / "neuronal.toml"


def published_tables(numbers: Sequence[int], sparsities: Iterable[float]) -> list[Table]:
    """Return the paper's tables of those numbers; of tables that have a sparsity, those of the given ones."""
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
    lines = marked(groups if place is not None else [str(number) for number in range(len(rows))], grid, metric)
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
        start="papers" if metric == "perplexity" else "",
        sparsity=table.get("sparsity"),
        note="; ".join(table.get("notes", ())),
    )


def _printed(value: float) -> str:
    """Format a number as the paper prints it."""
    if math.isnan(value):
        return "-"
    return f"{value:.2e}".replace("e+0", "e") if abs(value) >= 1e4 else f"{value:g}"
