"""report.html of one pruning run, made from the files that the run left behind."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from neuronal_ray.cli.atomic import write_text
from neuronal_ray.core.emptied import name_emptied
from neuronal_ray.core.layout import Linear
from neuronal_ray.report.figures import Canvas, block_figure, row_figure, search_figure, symbol_of
from neuronal_ray.report.html import Html, fill, joined
from neuronal_ray.report.inputs import Run, SearchStep, read_run
from neuronal_ray.report.page import HALF, at_both_widths, cell, details, facts, figure, page, scrolled, section, table
from neuronal_ray.report.pruning_json import Benchmark, Score, mode_matters


def write_report(directory: Path) -> Path:
    """Write report.html into `directory`, whole or not at all.

    Raises BadInput that says what is missing or malformed.
    """
    path = directory / "report.html"
    write_text(path, run_page(read_run(directory)))
    return path


def run_page(run: Run) -> Html:
    """Return the page of one run."""
    target = f"{100 * run.target:g}%"
    sections = [
        fill("<h1>{model}</h1>", model=run.model),
        fill(
            '<p class="lead">{method} with {parts}, target {target}{mode}</p>',
            method=run.method,
            parts=", ".join([f"{run.allocation} allocation", *run.additions]),
            target=target,
            mode=fill(" <small>&middot; mode {mode}</small>", mode=run.mode)
            if mode_matters(run.mode, searched=bool(run.steps))
            else Html(""),
        ),
        _tally(run),
        _perplexities(run.scores),
        _benchmarks(run.benchmarks),
        _search(run),
        _allocation(run),
        _provenance(run),
    ]
    return page(f"{run.model} pruned to {target}", sections)


def _tally(run: Run) -> Html:
    """Compare the achieved sparsity with the target: exact means that no other count is nearer to the target."""
    exact = abs(run.pruned - run.target * run.prunable) < 1
    drift = f"{100 * (run.achieved - run.target):+.3f} points from the target"
    values = [
        (f"{100 * run.achieved:.3f}%", "sparsity, exact to the weight" if exact else f"sparsity, {drift}"),
        (f"{run.pruned:,}", f"weights removed, of {run.prunable:,} prunable"),
    ]
    items = joined(fill("<div><dt>{name}</dt><dd>{value}</dd></div>", name=name, value=value) for value, name in values)
    tally = fill('<dl class="tally">{items}</dl>', items=items)
    notes = []
    names = [Linear(linear.block, linear.path) for linear in run.linears]
    empty = [
        name
        for name, linear in zip(names, run.linears, strict=True)
        if linear.pruned == linear.columns * len(linear.row_pruned)
    ]
    if empty:
        notes.append(f"Without any weight: {name_emptied(empty, names)}.")
    planned = sum(linear.pruned for linear in run.linears)
    if planned != run.pruned:
        notes.append(f"The plan removes {planned:,} weights; the saved tensors hold {run.pruned:,} zeros.")
    return joined([tally, *(fill("<p>{note}</p>", note=note) for note in notes)])


def _perplexities(scores: Sequence[Score]) -> Html:
    if not scores:
        return section("Perplexity", Html('<p class="muted">The model was not evaluated.</p>'))
    baselines = list(dict.fromkeys(name for score in scores for name in score.baselines))
    rows = [
        [
            score.name,
            _perplexity(score.dense),
            *(_perplexity(score.baselines[name]) if name in score.baselines else "" for name in baselines),
            _perplexity(score.pruned),
            f"\u00d7 {_perplexity(score.pruned / score.dense)}",
        ]
        for score in scores
    ]
    head = ["Text", "Dense", *map(str.capitalize, baselines), "This model", "Ratio"]
    texts = "; ".join(
        f"{s.name}: {s.windows:,} windows of {s.sequence_length:,} tokens, window start {s.window_start}"
        for s in scores
    )
    content = scrolled(_table(rows, head=head, kind="scores"))
    return section("Perplexity", joined([content, fill("\n<p><small>{texts}</small></p>", texts=texts)]))


def _benchmarks(benchmarks: Sequence[Benchmark]) -> Html:
    if not benchmarks:
        return Html("")
    plans = list(dict.fromkeys(name for benchmark in benchmarks for name in benchmark.others))
    rows = [
        [
            benchmark.name,
            benchmark.metric,
            *(f"{benchmark.others[plan]:.4f}" if plan in benchmark.others else "" for plan in plans),
            f"{benchmark.value:.4f}",
            f"{benchmark.rows:,}",
        ]
        for benchmark in benchmarks
    ]
    head = ["Benchmark", "Metric", *map(str.capitalize, plans), "This model", "Questions"]
    return section("Benchmarks", scrolled(_table(rows, head=head, kind="scores")))


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else "overflow"


def _search(run: Run) -> Html:
    if not run.steps:
        return section("Search", Html('<p class="muted">There was no search: the allocation tries no candidates.</p>'))
    about = Html(
        "<p>Each step tries its candidates and selects one of the lowest score: neuron alignment, loss, or KL "
        "divergence from the dense model. An allocation may ask for more than the lowest score, for example that "
        "it is the lowest on both halves of the search text.</p>"
    )
    figures = joined(_step_figure(step, f"step-{number}") for number, step in enumerate(run.steps))
    tried = [candidate for step in run.steps for candidate in step.candidates]
    rows = [
        [
            candidate.step,
            f"{candidate.lam:g}",
            f"{candidate.score:#,.6g}".rstrip("."),
            f"{candidate.seconds:,.1f}",
            "selected" * candidate.selected,
        ]
        for candidate in tried
    ]
    chosen = [number for number, candidate in enumerate(tried) if candidate.selected]
    head = ["Step", "\u03bb or number", "Score", "Seconds", ""]
    listed = details("All candidates", _table(rows, head=head, chosen=chosen), count=len(rows))
    pair = fill('<div class="pair">{figures}</div>', figures=figures)
    return section("Search", joined([about, pair, listed], "\n"))


def _step_figure(step: SearchStep, key: str) -> Html:
    count, selected = len(step.candidates), f"{step.selected.lam:g}"
    criterion = {"kl": "KL divergence"}.get(step.selected.criterion, step.selected.criterion.capitalize())
    label = f"{criterion} of the {count} candidates of the {step.name} step; {selected} is selected"
    drawing = search_figure(step, Canvas(key=key, width=HALF, label=label))
    symbol = symbol_of(step.noun)
    numbered = step.noun == "candidate"
    which = f"candidate {selected} of {count}" if numbered else f"{symbol} = {selected} of {count} candidates"
    return figure(drawing, f"{step.name.capitalize()} step: {which}, in {step.seconds:,.1f} s")


def _allocation(run: Run) -> Html:
    num_blocks = len({linear.block for linear in run.linears})
    num_rows = sum(len(linear.row_pruned) for linear in run.linears)
    blocks = f"{num_blocks:,} block{'s' if num_blocks > 1 else ''}"
    by_block = at_both_widths(
        "blocks",
        f"Sparsity of {blocks} and of their {len(run.linears):,} linears, relative to the target",
        lambda canvas: block_figure(run.linears, canvas, target=run.target),
    )
    by_row = at_both_widths(
        "rows",
        f"Distribution of the sparsity of {num_rows:,} output rows, by kind of linear",
        lambda canvas: row_figure(run.linears, canvas, target=run.target),
    )
    block_caption = fill(
        "Sparsity of {blocks} and of the {linears} linears in them. "
        '<b class="sparser">Sparser</b> than the target is orange, <b class="denser">denser</b> is blue; '
        "the dashed line is the target.",
        blocks=blocks,
        linears=f"{len(run.linears):,}",
    )
    row_caption = (
        f"Sparsity of {num_rows:,} output rows, all blocks together. Each ridge is scaled to its own highest point."
    )
    sections = [section("Blocks", figure(by_block, block_caption)), section("Rows", figure(by_row, row_caption))]
    return joined(sections, "\n")


def _provenance(run: Run) -> Html:
    longest = max(run.seconds.values(), default=0.0) or 1.0
    stages = []
    for stage, seconds in run.seconds.items():
        share = f"{100 * seconds / longest:.1f}"
        bar = fill('<td class="bar"><i style="width:{share}%"></i></td>', share=share)
        stages.append(((stage,), (bar, cell(f"{seconds:,.1f}"))))
    total = fill(
        '<tfoot><tr><th scope="row">total</th><td></td><td>{total}</td></tr></tfoot>',
        total=f"{sum(run.seconds.values()):,.1f}",
    )
    devices = [f"{count} \u00d7 {device}" for device, count in Counter(run.devices).items()]
    sections = [
        section("Seconds", table(stages, foot=total)),
        section("Calibration", _facts(run.calibration)),
        section("Made with", _facts({**run.versions, "devices": ", ".join(devices)})),
        details("Configuration", _facts(run.config), count=len(run.config)),
    ]
    return joined(sections, "\n")


def _facts(values: Mapping[str, object]) -> Html:
    return facts((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())


def _table(
    rows: Sequence[Sequence[str]], *, head: Sequence[str], kind: str = "plain", chosen: Sequence[int] = ()
) -> Html:
    """Return a table of text; the first text of a row is its heading."""
    lines = [((row[0],), [cell(text) for text in row[1:]]) for row in rows]
    return table(lines, head=((), head), kind=kind, chosen=chosen)
