"""The report on one or more sweeps, next to the paper's tables: one self-contained HTML page, or Markdown."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import islice
from pathlib import Path
from typing import Literal

from neuronal_ray.cli.read_files import read_json
from neuronal_ray.report import page
from neuronal_ray.report.comparisons import cases_of, comparison_tables
from neuronal_ray.report.curves import curves
from neuronal_ray.report.figures import Canvas, block_figure, curve_figure, row_figure, runtime_figure
from neuronal_ray.report.html import Html, fill, joined
from neuronal_ray.report.inputs import LinearSparsity, read_linears, read_results
from neuronal_ray.report.published_tables import published_tables
from neuronal_ray.report.schemas import DENSE, CellId, Result
from neuronal_ray.report.study_tables import Table, in_title, lambda_table, result_tables, seconds_table
from neuronal_ray.report.style import MARK

_MOST_CURVES, _MOST_PLANS = 40, 24

_SORTING = Html("""
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
""")


@dataclass(frozen=True, kw_only=True)
class Study:
    """The results of one or more sweeps.

    `combinations` by cell are equal for cells that differ in their variant alone. Variants are compared with each of
    `references`; a reference of several variants is the best of them in each case.
    """

    title: str
    paths: tuple[Path, ...]
    reproduces: tuple[int, ...]
    rows: tuple[Result, ...]
    combinations: Mapping[str, str]
    references: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class _Cell:
    """Older sweeps have no combinations."""

    combination: str = ""


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What is read of a sweep.json; older sweeps compare nothing."""

    format: Literal[1]
    title: str
    reproduces: tuple[str, ...]
    cells: dict[CellId, _Cell]
    compare: tuple[tuple[str, ...], ...] | None = None


def read_studies(paths: Sequence[Path]) -> Study:
    """Read sweeps' directories. Raises BadInput that names what is missing or cannot be read."""
    rows = read_results(paths)
    places: dict[str, int] = {}
    titles: list[str] = []
    numbers: list[int] = []
    combinations: dict[str, str] = {}
    references: list[tuple[str, ...]] = []
    for path in paths:
        index = read_json(path / "sweep.json", _Index, flag="RUNS")
        titles.append(index.title)
        places |= {cell: len(places) + number for number, cell in enumerate(index.cells)}
        numbers += [int(word[1]) for text in index.reproduces if (word := re.fullmatch(r"table (\d{1,3})", text))]
        if index.compare is not None:
            references += index.compare
            combinations |= {cell: known.combination for cell, known in index.cells.items()}
    rows.sort(key=lambda row: places.get(row.cell, -1))  # the file's order; dense rows first
    distinct = {(row.cell, row.evaluation): row for row in rows}
    return Study(
        title="; ".join(dict.fromkeys(titles)),
        paths=tuple(paths),
        reproduces=tuple(dict.fromkeys(numbers)),
        rows=tuple(distinct.values()),
        combinations=combinations,
        references=tuple(dict.fromkeys(references)),
    )


def study_markdown(study: Study) -> str:
    """Return every table as Markdown: the best bold, the second best underlined."""
    parts = [f"<!-- {MARK} -->", f"# {_plain(study.title)}", _plain(_lead(study))]
    for table in [*_ours(study), *_published(study)]:
        head = [*map(_plain, table.words), *map(_plain, table.columns)]
        parts.append(f"## {_plain(table.title)}")
        lines = [" | ".join(head), " | ".join("---" for _ in head)]
        for words, marks in zip(table.rows, table.marks, strict=True):
            numbers = ["" if mark is None else _marked(mark.text, mark.rank, "**", "<u>", "</u>") for mark in marks]
            lines.append(" | ".join([*map(_plain, words), *numbers]))
        parts.append("\n".join(f"| {line} |" for line in lines))
        parts += [f"*{_plain(table.note)}*"] if table.note else []
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Return text for one line of Markdown, in which nothing is markup."""
    return re.sub(r"([\\`*\[\]|~$])", r"\\\1", escape(" ".join(text.split()), quote=False))


def study_page(study: Study) -> Html:
    """Return the page: tables next to the paper's, runtime against perplexity, curves, plans, devices and versions."""
    ours, published = _ours(study), _published(study)
    sections = [
        fill("<h1>{title}</h1>", title=study.title),
        fill('<p class="lead">{lead}</p>', lead=_lead(study)),
        Html(
            '<p class="muted">The best of a method\'s top-ups is <b>bold</b>, the second best <u>underlined</u>. '
            "Click a column's head to sort.</p>"
        ),
        *(_pair(table, [other for other in published if _alike(table, other)]) for table in ours),
        *(_table(table) for table in published if not any(_alike(one, table) for one in ours)),
        *_runtimes(study),
        *_curves(study),
        *_plans(study),
        _made_with(study),
    ]
    return page.page(study.title, sections, script=_SORTING)


def _lead(study: Study) -> str:
    cells = {row.cell for row in study.rows if row.method != DENSE}
    models = sorted({Path(row.model).name for row in study.rows})
    overflows = sum(row.problem is not None for row in study.rows)
    lead = f"{len(cells)} prunings of {', '.join(models)}, {len(study.rows)} evaluations"
    return lead + (f"; {overflows} of them overflowed" if overflows else "")


def _ours(study: Study) -> list[Table]:
    extra = (lambda_table(study.rows), seconds_table(study.rows))
    compared = [row for row in study.rows if row.cell in study.combinations]
    return [
        *result_tables(study.rows),
        *comparison_tables(cases_of(compared, study.combinations), study.references),
        *(table for table in extra if table is not None),
    ]


def _published(study: Study) -> list[Table]:
    return published_tables(study.reproduces, {row.sparsity for row in study.rows if row.method != DENSE})


def _marked(text: str, rank: int, strong: str, low: str, high: str) -> str:
    return f"{strong}{text}{strong}" if rank == 1 else f"{low}{text}{high}" if rank == 2 else text


def _alike(ours: Table, published: Table) -> bool:
    return (ours.metric, ours.start, ours.sparsity) == (published.metric, published.start, published.sparsity)


def _pair(ours: Table, published: Sequence[Table]) -> Html:
    """Put the paper's tables of the same metric and sparsity next to a table, where the window is wide enough."""
    if not published:
        return _table(ours)
    return fill(
        '<div class="tables"><section>{ours}</section><section>{theirs}</section></div>',
        ours=_table(ours),
        theirs=joined(map(_table, published)),
    )


def _table(table: Table) -> Html:
    lines = [
        (words, [page.cell("") if m is None else page.cell(m.text, rank=m.rank, value=m.value) for m in marks])
        for words, marks in zip(table.rows, table.marks, strict=True)
    ]
    content = page.scrolled(page.table(lines, head=(table.words, table.columns), kind="sortable"))
    note = fill("<p><small>{note}</small></p>", note=table.note) if table.note else ""
    return page.section(table.title, joined([content, note]))


def _runtimes(study: Study) -> list[Html]:
    """Draw perplexity against the seconds of the plan, per model, text and sparsity (the paper's Figure 1)."""
    groups: dict[tuple[str, str, str, float, str], list[tuple[str, float, float]]] = {}
    for row in study.rows:
        if row.method != DENSE and row.metric == "perplexity" and row.value is not None:
            key = (row.model, row.evaluation, row.start, row.sparsity, row.method)
            groups.setdefault(key, []).append((row.variant, row.seconds, row.value))
    figures = []
    for number, ((model, evaluation, start, sparsity, method), points) in enumerate(groups.items()):
        distinct = list(dict.fromkeys(name for name, _, _ in points))
        if not 3 <= len(distinct) <= 12:
            continue
        what = f"perplexity on {evaluation}{in_title(start)}"
        label = f"{Path(model).name}, {method}, {100 * sparsity:g} %: {what}, against seconds"
        canvas = Canvas(key=f"runtime-{number}", width=page.NARROW, label=label)
        figures.append(page.figure(runtime_figure(points, canvas), label))
    return _in_pairs("Perplexity against seconds", figures[:_MOST_CURVES])


def _curves(study: Study) -> list[Html]:
    figures = []
    for number, curve in enumerate(curves(study.rows)[:_MOST_CURVES]):
        canvas = Canvas(key=f"curve-{number}", width=page.NARROW, label=f"{curve.title} over {curve.option}")
        figures.append(page.figure(curve_figure(curve, canvas), curve.title))
    return _in_pairs("Over one option", figures)


def _in_pairs(title: str, figures: Sequence[Html]) -> list[Html]:
    if not figures:
        return []
    return [page.section(title, fill('<div class="pair">{figures}</div>', figures=joined(figures)))]


def _plans(study: Study) -> list[Html]:
    """Draw the sparsity per block and row of each plan that is not uniform."""
    parts = []
    for row, linears in islice(_spread_plans(study), _MOST_PLANS):
        name = f"{Path(row.model).name}, {row.method}, {row.variant} at {100 * row.sparsity:g} %, seed {row.seed}"
        blocks = page.at_both_widths(
            f"{row.cell}-b", f"Sparsity per block: {name}", partial(block_figure, linears, target=row.sparsity)
        )
        rows = page.at_both_widths(
            f"{row.cell}-r", f"Sparsity per row: {name}", partial(row_figure, linears, target=row.sparsity)
        )
        parts.append(page.details(name, joined([blocks, rows])))
    return [page.section("Sparsity per block and per row", joined(parts, "\n"))] if parts else []


def _spread_plans(study: Study) -> Iterator[tuple[Result, tuple[LinearSparsity, ...]]]:
    """Yield the plans whose rows do not all have the same sparsity, to the weight."""
    for cell, row in {row.cell: row for row in study.rows if row.method != DENSE}.items():
        files = [path / "plans" / f"{cell}.parquet" for path in study.paths]
        for file in [file for file in files if file.is_file()][:1]:
            linears = read_linears(file)
            if any(abs(linear.row_pruned - row.achieved * linear.columns).max() > 1 for linear in linears):
                yield row, linears


def _made_with(study: Study) -> Html:
    devices = sorted({row.device for row in study.rows})
    versions = sorted({row.versions for row in study.rows})
    facts = [("devices", ", ".join(devices)), *(("versions", text) for text in versions)]
    facts.append(("most memory of a worker", f"{max(row.peak_bytes for row in study.rows) / 2**30:.2f} GiB"))
    facts += [("read from", str(path)) for path in study.paths]
    return page.section("Made with", page.facts(facts))
