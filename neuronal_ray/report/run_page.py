"""report.html of one pruning run, made from the files that the run left behind."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from neuronal_ray.cli.atomic import write_text
from neuronal_ray.report.figures import Canvas, block_figure, row_figure, search_figure, symbol_of
from neuronal_ray.report.inputs import Benchmark, Run, Score, SearchStep, read_run
from neuronal_ray.report.page import HALF, at_both_widths, cell, details, facts, figure, page, scrolled, table


def write_report(directory: Path) -> Path:
    """Write report.html into `directory`, whole or not at all.

    Raises BadInput that says what is missing or malformed.
    """
    path = directory / "report.html"
    write_text(path, run_page(read_run(directory)))
    return path


def run_page(run: Run) -> str:
    """Return the page of one run."""
    target = f"{100 * run.target:g}%"
    method = f"{escape(run.method)} with {escape(', '.join([f'{run.allocation} allocation', *run.additions]))}"
    sections = [
        f"<h1>{escape(run.model)}</h1>",
        f'<p class="lead">{method}, target {target} <small>&middot; mode {escape(run.mode)}</small></p>',
        _tally(run),
        _perplexities(run.scores),
        _benchmarks(run.benchmarks),
        _search(run),
        _allocation(run),
        _provenance(run),
    ]
    return page(f"{run.model} pruned to {target}", sections)


def _tally(run: Run) -> str:
    """Compare the achieved sparsity with the target: exact means that no other count is nearer to the target."""
    exact = abs(run.pruned - run.target * run.prunable) < 1
    drift = f"{100 * (run.achieved - run.target):+.3f} points from the target"
    values = [
        (f"{100 * run.achieved:.3f}%", "sparsity, exact to the weight" if exact else f"sparsity, {drift}"),
        (f"{run.pruned:,}", f"weights removed, of {run.prunable:,} prunable"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for value, name in values)
    planned = sum(linear.pruned for linear in run.linears)
    note = f"<p>The plan removes {planned:,} weights; the saved tensors hold {run.pruned:,} zeros.</p>"
    return f'<dl class="tally">{items}</dl>' + (note if planned != run.pruned else "")


def _perplexities(scores: Sequence[Score]) -> str:
    if not scores:
        return '<h2>Perplexity</h2>\n<p class="muted">The model was not evaluated.</p>'
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
    texts = ", ".join(f"{s.name}: {s.windows:,} windows of {s.sequence_length:,} tokens" for s in scores)
    content = scrolled(_table(rows, head=head, kind="scores"))
    return f"<h2>Perplexity</h2>\n{content}\n<p><small>{escape(texts)}</small></p>"


def _benchmarks(benchmarks: Sequence[Benchmark]) -> str:
    if not benchmarks:
        return ""
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
    return f"<h2>Benchmarks</h2>\n{scrolled(_table(rows, head=head, kind='scores'))}"


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else "overflow"


def _search(run: Run) -> str:
    parts = ["<h2>Search</h2>"]
    if not run.steps:
        return parts[0] + '\n<p class="muted">There was no search: the allocation tries no candidates.</p>'
    parts.append(
        "<p>Each step tries its candidates and selects one of the lowest score: neuron alignment, loss, or KL "
        "divergence from the dense model. An allocation may ask for more than the lowest score, for example that "
        "it is the lowest on both halves of the search text.</p>"
    )
    parts.append(f'<div class="pair">{"".join(_step_figure(step) for step in run.steps)}</div>')
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
    return "\n".join([*parts, details("All candidates", _table(rows, head=head, chosen=chosen), count=len(rows))])


def _step_figure(step: SearchStep) -> str:
    count, selected = len(step.candidates), f"{step.selected.lam:g}"
    criterion = {"kl": "KL divergence"}.get(step.selected.criterion, step.selected.criterion.capitalize())
    label = f"{criterion} of the {count} candidates of the {step.name} step; {selected} is selected"
    drawing = search_figure(step, Canvas(key=step.name, width=HALF, label=label))
    symbol = symbol_of(step.noun)
    which = f"{symbol} = {selected} of {count} candidates" if symbol != step.noun else f"{symbol} {selected} of {count}"
    return figure(drawing, escape(f"{step.name.capitalize()} step: {which}, in {step.seconds:,.1f} s"))


def _allocation(run: Run) -> str:
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
    block_caption = (
        f"Sparsity of {blocks} and of the {len(run.linears):,} linears in them. "
        '<b class="sparser">Sparser</b> than the target is orange, <b class="denser">denser</b> is blue; '
        "the dashed line is the target."
    )
    row_caption = (
        f"Sparsity of {num_rows:,} output rows, all blocks together. Each ridge is scaled to its own highest point."
    )
    return f"<h2>Blocks</h2>\n{figure(by_block, block_caption)}\n<h2>Rows</h2>\n{figure(by_row, row_caption)}"


def _provenance(run: Run) -> str:
    longest = max(run.seconds.values(), default=0.0) or 1.0
    stages = []
    for stage, seconds in run.seconds.items():
        bar = f'<td class="bar"><i style="width:{100 * seconds / longest:.1f}%"></i></td>'
        stages.append(((stage,), (bar, cell(f"{seconds:,.1f}"))))
    total = f'<tr><th scope="row">total</th><td></td><td>{sum(run.seconds.values()):,.1f}</td></tr>'
    devices = [f"{count} \u00d7 {device}" for device, count in Counter(run.devices).items()]
    return "\n".join(
        [
            f"<h2>Seconds</h2>\n{table(stages, foot=f'<tfoot>{total}</tfoot>')}",
            f"<h2>Calibration</h2>\n{_facts(run.calibration)}",
            f"<h2>Made with</h2>\n{_facts({**run.versions, 'devices': ', '.join(devices)})}",
            details("Configuration", _facts(run.config), count=len(run.config)),
        ]
    )


def _facts(values: Mapping[str, object]) -> str:
    return facts((key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items())


def _table(
    rows: Sequence[Sequence[str]], *, head: Sequence[str], kind: str = "plain", chosen: Sequence[int] = ()
) -> str:
    """Return a table of plain text; the first text of a row is its heading."""
    lines = [((row[0],), [cell(text) for text in row[1:]]) for row in rows]
    return table(lines, head=((), head), kind=kind, chosen=chosen)
