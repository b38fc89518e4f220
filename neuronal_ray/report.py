"""What did a pruning run do? One self-contained HTML page, from the three files that the run left behind."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from neuronal_ray.report_figures import (
    Candidate,
    Canvas,
    LinearSparsity,
    SearchStep,
    block_figure,
    row_figure,
    search_figure,
)

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")
FORMAT = 1
INPUTS = ("pruning.json", "allocation.parquet", "search.parquet")
STEPS = ("block", "row")
WIDE, HALF, NARROW = 736, 352, 340  # CSS pixels: the page, half of it, a phone

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #23262b; --muted: #686e76; --line: #dcdee1;
  --denser: #33698f; --sparser: #b9582c; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15171a; --ink: #e4e6e9; --muted: #989fa8; --line: #34383e; --denser: #6ea9d8; --sparser: #e58d5c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums lining-nums; }
main { max-width: 784px; margin: 0 auto; padding: 72px 24px 96px; }
h1 { margin: 0; font-size: 2rem; font-weight: 600; line-height: 1.2; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { margin: 64px 0 12px; font-size: 1.05rem; font-weight: 600; }
p { margin: 8px 0; max-width: 38em; }
.lead { font-size: 1.15rem; }
.muted, figcaption, th, summary small { color: var(--muted); }
.tally { display: flex; flex-wrap: wrap; gap: 16px 56px; margin: 40px 0 0; }
.tally div { display: flex; flex-direction: column-reverse; }
.tally dt { color: var(--muted); font-size: .875rem; }
.tally dd { margin: 0; font-size: 1.75rem; font-weight: 300; letter-spacing: -.01em; }
table { width: 100%; border-collapse: collapse; font-size: .9375rem; }
th, td { padding: 7px 0 7px 20px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: baseline; }
th:first-child { padding-left: 0; text-align: left; }
th { font-weight: 400; }
thead th { font-size: .8125rem; }
tbody tr.chosen > * { font-weight: 600; color: var(--ink); }
.scores tbody th { color: var(--ink); }
.scores td:nth-child(3) { font-weight: 600; }
.facts td { text-align: left; overflow-wrap: anywhere; }
.facts th { width: 13em; }
.share { width: 45%; }
.share i { display: block; height: 7px; background: var(--denser); opacity: .75; print-color-adjust: exact;
  -webkit-print-color-adjust: exact; }
figure { margin: 16px 0 0; break-inside: avoid; }
figcaption { font-size: .875rem; max-width: 46em; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px 32px; }
.narrow { display: none; }
details { border-bottom: 1px solid var(--line); padding: 10px 0; }
details table { margin-top: 8px; }
details tr:last-child > * { border-bottom: 0; }
summary { cursor: pointer; }
@media screen and (max-width: 600px) {
  main { padding: 40px 16px 64px; }
  h1 { font-size: 1.6rem; }
  .pair { grid-template-columns: 1fr; }
  .wide { display: none; }
  .narrow { display: block; }
  .facts th { width: 8.5em; }
  th, td { padding-left: 10px; } }
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 32px; }
  tr { break-inside: avoid; }
  details::details-content { content-visibility: visible; } }
"""


@dataclass(frozen=True, kw_only=True)
class Score:
    """One evaluation set: `metric` is "perplexity" or "accuracy"."""

    name: str
    metric: str
    dense: float
    pruned: float
    detail: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of search.parquet."""

    step: str
    lam: float
    alignment: float
    selected: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that the page shows."""

    model: str
    method: str
    allocation: str
    mode: str
    target: float
    achieved: float
    pruned: int
    prunable: int
    steps: tuple[SearchStep, ...]
    scores: tuple[Score, ...]
    seconds: Mapping[str, float]
    calibration: Mapping[str, object]
    versions: Mapping[str, object]
    devices: tuple[str, ...]
    config: Mapping[str, object]
    linears: tuple[LinearSparsity, ...]
    trials: tuple[Trial, ...]


def write_report(directory: Path) -> Path:
    """Write `directory`/report.html, whole or not at all; ValueError says which input is missing or malformed."""
    page = _page(_read(directory))
    path = directory / "report.html"
    temporary = directory / f".report.html.{os.getpid()}"
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _read(directory: Path) -> Run:
    missing = [name for name in INPUTS if not (directory / name).is_file()]
    if missing:
        raise ValueError(f"no {' and no '.join(missing)} there, expected a directory that neuronal_ray.prune wrote")
    try:
        document = json.loads((directory / "pruning.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"pruning.json is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f'pruning.json has another format, expected an object with "format": {FORMAT}')
    sparsity = _get(document, "sparsity", dict)
    search = _get(document, "search", dict)
    evaluation = _get(document, "evaluation", dict)
    seconds = _get(document, "seconds", dict)
    return Run(
        model=_get(document, "model", str),
        method=_get(document, "method", str),
        allocation=_get(document, "allocation", str),
        mode=_get(document, "mode", str),
        target=_get(sparsity, "target", float),
        achieved=_get(sparsity, "achieved", float),
        pruned=_get(sparsity, "pruned", int),
        prunable=_get(sparsity, "prunable", int),
        steps=tuple(_search_step(name, _get(search, name, dict)) for name in STEPS if name in search),
        scores=tuple(_score(name, _get(evaluation, name, dict)) for name in evaluation),
        seconds={stage: _get(seconds, stage, float) for stage in seconds},
        calibration=_get(document, "calibration", dict),
        versions=_get(document, "versions", dict),
        devices=tuple(str(device) for device in _get(document, "devices", list)),
        config=_get(document, "config", dict),
        linears=_linears(directory / "allocation.parquet"),
        trials=_trials(directory / "search.parquet"),
    )


def _get(node: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = node.get(key)
    if kind is float and type(value) is int:
        value = float(value)  # JSON has one kind of number
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"pruning.json: {key!r} is {value!r:.80}, expected {kind.__name__}")
    return value


def _search_step(name: str, node: Mapping[str, Any]) -> SearchStep:
    candidates = tuple(
        Candidate(lam=_get(candidate, "lambda", float), alignment=_get(candidate, "alignment", float))
        for candidate in _get(node, "candidates", list)
    )
    selected = _get(node, "selected", float)
    if selected not in [candidate.lam for candidate in candidates]:
        raise ValueError(f"pruning.json: 'selected' of the {name} step is {selected:g}, expected one of its candidates")
    return SearchStep(name=name, selected=selected, candidates=candidates, seconds=_get(node, "seconds", float))


def _score(name: str, node: Mapping[str, Any]) -> Score:
    metric = "accuracy" if "accuracy" in node else "perplexity"
    detail = ""
    if metric == "perplexity":
        detail = f"{_get(node, 'windows', int):,} \u00d7 {_get(node, 'sequence_length', int):,}"
    dense = _get(_get(node, "dense", dict), metric, float)
    return Score(name=name, metric=metric, dense=dense, pruned=_get(node, metric, float), detail=detail)


def _linears(path: Path) -> tuple[LinearSparsity, ...]:
    import pyarrow as pa

    row_type = pa.list_(pa.int32())
    types = dict(block=pa.int32(), path=pa.string(), rows=pa.int32(), columns=pa.int32(), pruned=pa.int64())
    table = _table_of(path, pa.schema({**types, "row_pruned": row_type}.items()))
    if table.num_rows == 0:
        raise ValueError(f"{path.name} has no rows, expected one per linear")
    heads = table.drop_columns(["row_pruned"]).to_pylist()
    row_pruned = [row.values.to_numpy(zero_copy_only=False) for row in table.column("row_pruned")]
    for head, counts in zip(heads, row_pruned, strict=True):
        if len(counts) != head["rows"] or int(counts.sum()) != head["pruned"]:
            given = f"{len(counts)} rows that sum to {counts.sum()}"
            expected = f"{head['rows']} that sum to {head['pruned']}"
            raise ValueError(f"{path.name}: block {head['block']} {head['path']} has {given}, expected {expected}")
    return tuple(
        LinearSparsity(
            block=head["block"],
            path=head["path"],
            columns=head["columns"],
            pruned=head["pruned"],
            row_pruned=counts,
        )
        for head, counts in zip(heads, row_pruned, strict=True)
    )


def _trials(path: Path) -> tuple[Trial, ...]:
    import pyarrow as pa

    types = {"step": pa.string(), "lambda": pa.float64(), "alignment": pa.float64(), "selected": pa.bool_()}
    rows = _table_of(path, pa.schema({**types, "seconds": pa.float64()}.items())).to_pylist()
    return tuple(
        Trial(
            step=row["step"],
            lam=row["lambda"],
            alignment=row["alignment"],
            selected=row["selected"],
            seconds=row["seconds"],
        )
        for row in rows
    )


def _table_of(path: Path, schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
        missing = [name for name in schema.names if name not in table.column_names]
        if missing:
            raise ValueError(f"{path.name} has no column {', '.join(missing)}, expected {', '.join(schema.names)}")
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path.name} is not the parquet file that was expected: {error}") from error
    for name in schema.names:
        if table.column(name).null_count:
            raise ValueError(f"{path.name}: column {name} has nulls, expected none")
    return table


def _page(run: Run) -> str:
    title = f"{run.model} pruned to {100 * run.target:g}%"
    parts = [
        f'<h1>{escape(run.model)}</h1>\n<p class="lead">{escape(run.method)} with {escape(run.allocation)} allocation, '
        f'target {100 * run.target:g}% <span class="muted">&middot; {escape(run.mode)} mode</span></p>',
        _tally(run),
        *_scores(run.scores),
        *_search(run.steps),
        *_allocation(run),
        *_provenance(run),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
