"""What did a sweep find? One self-contained HTML page, or Markdown, over one or more sweeps and the paper's tables."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.report.figures import Canvas, block_figure, curve_figure, row_figure, runtime_figure
from neuronal_ray.report.inputs import read_linears
from neuronal_ray.report.study_tables import (
    Table,
    curves,
    lambda_table,
    published_tables,
    result_tables,
    seconds_table,
)
from neuronal_ray.report.style import STYLE
from neuronal_ray.sweep.files import DENSE, Row, read_results

_WIDE, _NARROW = 736, 340  # CSS pixels: the page, a phone
_MOST_CURVES, _MOST_PLANS = 40, 24

_SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const body = table.tBodies[0], up = head.ariaSort !== "ascending";
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)], [u, v] = [parseFloat(x), parseFloat(y)];
        const order = isNaN(u) || isNaN(v) ? (isNaN(u) - isNaN(v)) || x.localeCompare(y) : u - v;
        return up ? order : -order;
      });
      table.querySelectorAll("thead th").forEach((other) => { other.ariaSort = null; });
      head.ariaSort = up ? "ascending" : "descending";
      body.append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}
"""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What one or more sweeps left behind."""

    title: str
    paths: tuple[Path, ...]
    reproduces: tuple[int, ...]
    rows: tuple[Row, ...]


def read_studies(paths: Sequence[Path]) -> Study:
    """Read sweeps' directories. Raises BadInput that names what is missing or cannot be read."""
    rows = read_results(paths)
    places: dict[str, int] = {}
    titles: list[str] = []
    numbers: list[int] = []
    for path in paths:
        try:
            index = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
            titles.append(index["title"])
            places |= {cell: len(places) + number for number, cell in enumerate(index["cells"])}
            numbers += [int(word.split()[1]) for word in index["reproduces"] if word.startswith("table ")]
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise BadInput(f"RUNS: {path / 'sweep.json'} cannot be read ({error})") from error
    rows.sort(key=lambda row: places.get(row.cell, -1))  # the file's order; dense rows first
    distinct = {(row.cell, row.evaluation): row for row in rows}
    return Study(
        title="; ".join(dict.fromkeys(titles)),
        paths=tuple(paths),
        reproduces=tuple(dict.fromkeys(numbers)),
        rows=tuple(distinct.values()),
    )


def study_markdown(study: Study) -> str:
    """Every table as Markdown: the best bold, the second best underlined."""
    parts = [f"# {study.title}", _lead(study)]
    for table in [*_ours(study), *_published(study)]:
        head = [*table.words, *table.columns]
        parts.append(f"## {table.title}")
        lines = [" | ".join(head), " | ".join("---" for _ in head)]
        for words, marks in zip(table.rows, table.marks, strict=True):
            numbers = ["" if mark is None else _marked(mark.text, mark.rank, "**", "<u>", "</u>") for mark in marks]
            lines.append(" | ".join([*words, *numbers]))
        parts.append("\n".join(f"| {line} |" for line in lines))
        parts += [f"*{table.note}*"] if table.note else []
    return "\n\n".join(parts) + "\n"


def study_page(study: Study) -> str:
    """The page: tables beside the paper's, runtime against perplexity, curves, plans, what it was made with."""
    ours, published = _ours(study), _published(study)
    sections = [
        f"<h1>{escape(study.title)}</h1>",
        f'<p class="lead">{escape(_lead(study))}</p>',
        '<p class="muted">The best of a method\'s top-ups is <b>bold</b>, the second best <u>underlined</u>. '
        "Click a column's head to sort.</p>",
        *(_beside(table, [other for other in published if _alike(table, other)]) for table in ours),
        *(_table(table) for table in published if not any(_alike(one, table) for one in ours)),
        *_runtimes(study),
        *_curves(study),
        *_plans(study),
        _made_with(study),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(study.title)}</title>\n<style>{STYLE}</style>\n</head>",
            "<body>\n<main>",
            *sections,
            f"</main>\n<script>{_SORTING}</script>\n</body>\n</html>\n",
        ]
    )


def _lead(study: Study) -> str:
    cells = {row.cell for row in study.rows if row.method != DENSE}
    models = sorted({Path(row.model).name for row in study.rows})
    overflows = sum(row.problem is not None for row in study.rows)
    said = f"{len(cells)} prunings of {', '.join(models)}, {len(study.rows)} evaluations"
    return said + (f"; {overflows} of them overflowed" if overflows else "")


def _ours(study: Study) -> list[Table]:
    extra = (lambda_table(study.rows), seconds_table(study.rows))
    return [*result_tables(study.rows), *(table for table in extra if table is not None)]


def _published(study: Study) -> list[Table]:
    return published_tables(study.reproduces, {row.sparsity for row in study.rows if row.method != DENSE})


def _marked(text: str, rank: int, strong: str, low: str, high: str) -> str:
    return f"{strong}{text}{strong}" if rank == 1 else f"{low}{text}{high}" if rank == 2 else text


def _alike(ours: Table, published: Table) -> bool:
    return (ours.metric, ours.sparsity) == (published.metric, published.sparsity)


def _beside(ours: Table, published: Sequence[Table]) -> str:
    """A table and the paper's of the same metric and sparsity: side by side where the window is wide enough."""
    if not published:
        return _table(ours)
    theirs = "".join(_table(table) for table in published)
    return f'<div class="beside"><section>{_table(ours)}</section><section>{theirs}</section></div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col" class="word">{escape(word)}</th>' for word in table.words)
    head += "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = []
    for words, marks in zip(table.rows, table.marks, strict=True):
        cells = [f'<th scope="row">{escape(word)}</th>' for word in words]
        for mark in marks:
            if mark is None:
                cells.append("<td></td>")
                continue
            text = escape(mark.text)
            text = f"<b>{text}</b>" if mark.rank == 1 else f"<u>{text}</u>" if mark.rank == 2 else text
            cells.append(f'<td data-value="{mark.value!r}">{text}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>\n")
    note = f"<p><small>{escape(table.note)}</small></p>" if table.note else ""
    return (
        f"<h2>{escape(table.title)}</h2>\n"
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{''.join(body)}</tbody></table></div>{note}"
    )


def _runtimes(study: Study) -> list[str]:
    """Perplexity against the seconds that the plan took, per model, text and sparsity (the paper's Figure 1)."""
    groups: dict[tuple[str, str, float, str], list[tuple[str, float, float]]] = {}
    for row in study.rows:
        if row.method != DENSE and row.metric == "perplexity" and row.value is not None:
            key = (row.model, row.evaluation, row.sparsity, row.method)
            groups.setdefault(key, []).append((row.variant, row.seconds, row.value))
    figures = []
    for number, ((model, evaluation, sparsity, method), points) in enumerate(groups.items()):
        distinct = list(dict.fromkeys(name for name, _, _ in points))
        if not 3 <= len(distinct) <= 12:
            continue
        label = f"{Path(model).name}, {method}, {100 * sparsity:g} %: perplexity on {evaluation} against seconds"
        canvas = Canvas(key=f"runtime-{number}", width=_NARROW, label=label)
        figures.append(f"<figure>{runtime_figure(points, canvas)}<figcaption>{escape(label)}</figcaption></figure>")
    return _folded("Perplexity against seconds", figures[:_MOST_CURVES])


def _curves(study: Study) -> list[str]:
    figures = []
    for number, curve in enumerate(curves(study.rows)[:_MOST_CURVES]):
        canvas = Canvas(key=f"curve-{number}", width=_NARROW, label=f"{curve.title} over {curve.option}")
        figures.append(f"<figure>{curve_figure(curve, canvas)}<figcaption>{escape(curve.title)}</figcaption></figure>")
    return _folded("Over one option", figures)


def _folded(title: str, figures: Sequence[str]) -> list[str]:
    return [f'<h2>{title}</h2>\n<div class="pair">{"".join(figures)}</div>'] if figures else []


def _plans(study: Study) -> list[str]:
    """Sparsity per block and row of each plan that is not uniform."""
    parts = []
    cells = {row.cell: row for row in study.rows if row.method != DENSE and row.allocation != "uniform"}
    for cell, row in list(cells.items())[:_MOST_PLANS]:
        found = [path for one in study.paths if (path := one / "plans" / f"{cell}.parquet").is_file()]
        if not found:
            continue
        linears = read_linears(found[0])
        name = f"{Path(row.model).name}, {row.method}, {row.variant} at {100 * row.sparsity:g} %, seed {row.seed}"
        figures = []
        for width, kind in ((_WIDE, "wide"), (_NARROW, "narrow")):
            block = Canvas(key=f"{cell}-b-{kind}", width=width, label=f"Sparsity per block: {name}")
            rows = Canvas(key=f"{cell}-r-{kind}", width=width, label=f"Sparsity per row: {name}")
            drawn = block_figure(linears, block, target=row.sparsity) + row_figure(linears, rows, target=row.sparsity)
            figures.append(f'<div class="{kind}">{drawn}</div>')
        parts.append(f"<details><summary>{escape(name)}</summary>{''.join(figures)}</details>")
    return ["<h2>Sparsity per block and per row</h2>", *parts] if parts else []


def _made_with(study: Study) -> str:
    devices = sorted({row.device for row in study.rows})
    versions = sorted({row.versions for row in study.rows})
    facts = [("devices", ", ".join(devices)), *(("versions", text) for text in versions)]
    facts.append(("most memory of a worker", f"{max(row.peak_bytes for row in study.rows) / 2**30:.2f} GiB"))
    facts += [("read from", str(path)) for path in study.paths]
    body = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in facts)
    return f'<h2>Made with</h2>\n<table class="facts"><tbody>{body}</tbody></table>'
