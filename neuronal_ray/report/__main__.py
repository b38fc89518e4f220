"""`python -m neuronal_ray.report`: what did a run do? One self-contained page, from the files that it left behind."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from neuronal_ray.cli.atomic import write_text
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import exit_code
from neuronal_ray.report.figures import Canvas, block_figure, row_figure, search_figure
from neuronal_ray.report.inputs import Benchmark, Run, Score, SearchStep, read_run
from neuronal_ray.report.style import STYLE

WIDE, HALF, NARROW = 736, 352, 340  # CSS pixels: the page, half of it, a phone
_BASELINES = {
    "uniform": "Uniform",
    "block": "NeuronAL, blocks",
    "neuronal": "NeuronAL, blocks and rows",
}  # the same budget, spread otherwise


def write_report(directory: Path) -> Path:
    """Write report.html into `directory`, whole or not at all.

    Raises BadInput, which says what is missing or malformed.
    """
    path = directory / "report.html"
    write_text(path, _page(read_run(directory)))
    return path


def _page(run: Run) -> str:
    target = f"{100 * run.target:g}%"
    method = f"{escape(run.method)} with {escape(', '.join([f'{run.allocation} allocation', *run.additions]))}"
    sections = [
        _tally(run),
        _scores(run.scores),
        _benchmarks(run.benchmarks),
        _search(run),
        _allocation(run),
        _provenance(run),
    ]
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(run.model)} pruned to {target}</title>\n<style>{STYLE}</style>\n</head>",
            f"<body>\n<main>\n<h1>{escape(run.model)}</h1>",
            f'<p class="lead">{method}, target {target} <small>&middot; mode {escape(run.mode)}</small></p>',
            *sections,
            "</main>\n</body>\n</html>\n",
        ]
    )


def _tally(run: Run) -> str:
    """Achieved against target; exact means that no other number of weights is nearer to the target."""
    exact = abs(run.pruned - run.target * run.prunable) < 1
    drift = f"{100 * (run.achieved - run.target):+.3f} points from the target"
    facts = [
        (f"{100 * run.achieved:.3f}%", "sparsity, exact to the weight" if exact else f"sparsity, {drift}"),
        (f"{run.pruned:,}", f"weights removed, of {run.prunable:,} prunable"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for value, name in facts)
    planned = sum(linear.pruned for linear in run.linears)
    note = f"<p>The allocation asked for {planned:,} weights; the saved tensors hold {run.pruned:,} zeros.</p>"
    return f'<dl class="tally">{items}</dl>' + (note if planned != run.pruned else "")


def _scores(scores: Sequence[Score]) -> str:
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
    others = [_BASELINES.get(name, name) for name in baselines]
    table = _table(rows, head=["Text", "Dense", *others, "This model", "Ratio"], kind="scores")
    texts = ", ".join(f"{s.name}: {s.windows:,} windows of {s.sequence_length:,} tokens" for s in scores)
    return f'<h2>Perplexity</h2>\n<div class="scroll">{table}</div>\n<p><small>{escape(texts)}</small></p>'


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
    names = [{"dense": "Dense"}.get(plan, _BASELINES.get(plan, plan)) for plan in plans]
    head = ["Benchmark", "Metric", *names, "This model", "Questions"]
    return f'<h2>Benchmarks</h2>\n<div class="scroll">{_table(rows, head=head, kind="scores")}</div>'


def _perplexity(value: float) -> str:
    return f"{value:,.2f}" if math.isfinite(value) else "overflow"


def _search(run: Run) -> str:
    steps = run.steps
    parts = ["<h2>Search</h2>"]
    ran = [step.name for step in steps]
    if steps:
        parts.append(
            "<p>Each step tries its candidates and keeps one with the lowest score: neuron alignment, loss, or KL "
            "divergence from the dense model (adaptive: the lowest that is better on both halves of the text).</p>"
        )
        parts.append(f'<div class="pair">{"".join(_step_figure(step) for step in steps)}</div>')
    expected = ("block", "row") if run.allocation == "neuronal" else ()
    parts.extend(f'<p class="muted">The {name} step did not run.</p>' for name in expected if name not in ran)
    tried = [candidate for step in steps for candidate in step.candidates]
    if tried:
        rows = [
            [
                c.step,
                f"{c.lam:g}",
                f"{c.score:#,.6g}".rstrip("."),
                f"{c.seconds:,.1f}",
                "selected" * c.selected,
            ]
            for c in tried
        ]
        chosen = [number for number, candidate in enumerate(tried) if candidate.selected]
        table = _table(rows, head=["Step", "\u03bb or number", "Score", "Seconds", ""], chosen=chosen)
        parts.append(_details("All candidates", len(rows), table))
    return "\n".join(parts)


def _step_figure(step: SearchStep) -> str:
    num_candidates, lam = len(step.candidates), f"{step.selected.lam:g}"
    criterion = {"kl": "KL divergence"}.get(step.selected.criterion, step.selected.criterion.capitalize())
    label = f"{criterion} of the {num_candidates} candidates of the {step.name} step; {lam} is selected"
    figure = search_figure(step, Canvas(key=step.name, width=HALF, label=label))
    name = step.name.capitalize()
    which = f"&lambda; = {lam}" if step.by_lambda else f"number {lam}"
    caption = f"{name} step: {which} of {num_candidates} candidates, in {step.seconds:,.1f} s"
    return f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"


def _allocation(run: Run) -> str:
    num_blocks = len({linear.block for linear in run.linears})
    num_rows = sum(len(linear.row_pruned) for linear in run.linears)
    blocks = f"{num_blocks:,} block{'s' if num_blocks > 1 else ''}"
    return "\n".join(
        [
            "<h2>Blocks</h2>\n<figure>",
            _both_widths(
                "blocks",
                f"Sparsity of {blocks} and of their {len(run.linears):,} linears, relative to the target",
                lambda canvas: block_figure(run.linears, canvas, target=run.target),
            ),
            f"<figcaption>Sparsity of {blocks} and of the {len(run.linears):,} linears in them.",
            'What is <b class="sparser">sparser</b> than the target is orange,',
            'what is <b class="denser">denser</b> is blue; the dashed line is the target.</figcaption>',
            "</figure>\n<h2>Rows</h2>\n<figure>",
            _both_widths(
                "rows",
                f"Distribution of the sparsity of {num_rows:,} output rows, by kind of linear",
                lambda canvas: row_figure(run.linears, canvas, target=run.target),
            ),
            f"<figcaption>Sparsity of {num_rows:,} output rows, all blocks together.",
            "Each ridge is drawn to its own peak.</figcaption>\n</figure>",
        ]
    )


def _both_widths(key: str, label: str, draw: Callable[[Canvas], str]) -> str:
    """The same figure for a page and for a phone, so that its letters are as large as the text in both."""
    wide = draw(Canvas(key=f"{key}-wide", width=WIDE, label=label))
    narrow = draw(Canvas(key=f"{key}-narrow", width=NARROW, label=label))
    return f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>'


def _provenance(run: Run) -> str:
    longest = max(run.seconds.values(), default=0.0) or 1.0
    stages = [
        f'<tr><th scope="row">{escape(stage)}</th>'
        f'<td class="bar"><i style="width:{100 * seconds / longest:.1f}%"></i></td>'
        f"<td>{seconds:,.1f}</td></tr>"
        for stage, seconds in run.seconds.items()
    ]
    total = f'<tr><th scope="row">total</th><td></td><td>{sum(run.seconds.values()):,.1f}</td></tr>'
    devices = [f"{count} \u00d7 {device}" for device, count in Counter(run.devices).items()]
    return "\n".join(
        [
            "<h2>Seconds</h2>\n<table><tbody>",
            *stages,
            f"</tbody><tfoot>{total}</tfoot></table>",
            f"<h2>Calibration</h2>\n{_facts(run.calibration)}",
            f"<h2>Made with</h2>\n{_facts({**run.versions, 'devices': ', '.join(devices)})}",
            _details("Configuration", len(run.config), _facts(run.config)),
        ]
    )


def _facts(facts: Mapping[str, object]) -> str:
    rows = [[key, value if isinstance(value, str) else json.dumps(value)] for key, value in facts.items()]
    return _table(rows, kind="facts")


def _table(
    rows: Sequence[Sequence[str]],
    *,
    head: Sequence[str] = (),
    kind: str = "plain",
    chosen: Sequence[int] = (),
) -> str:
    """A table of plain strings, escaped here; the first cell of a row is its heading."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = []
    for number, (first, *others) in enumerate(rows):
        mark = ' class="chosen"' if number in chosen else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        body.append(f'<tr{mark}><th scope="row">{escape(first)}</th>{cells}</tr>\n')
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<table class="{kind}">{thead}<tbody>\n{"".join(body)}</tbody></table>'


def _details(title: str, count: int, content: str) -> str:
    return f"<details><summary>{title} <small>{count}</small></summary>\n{content}</details>"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray report", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="neuronal-ray report",
        description="Write report.html of one pruning run again, or a report over the results of one or more sweeps, "
        "beside the paper's tables. Example: neuronal-ray report runs/small/table3 --output table3.html",
    )
    parser.add_argument(
        "runs",
        metavar="RUNS",
        type=Path,
        nargs="+",
        help="the --output of neuronal-ray prune, or of neuronal-ray sweep",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="file ending in .html or .md; if absent report.html in RUNS"
    )
    arguments = parser.parse_args(argv)
    runs: list[Path] = arguments.runs
    if all((path / "sweep.json").is_file() for path in runs):
        output: Path = arguments.output or runs[0] / "report.html"
        _write_study(runs, output)
        print(output)
        return
    if len(runs) > 1 or arguments.output is not None:
        raise BadInput(f"RUNS: {runs[0]} has no sweep.json; several directories, and --output, are for sweeps")
    try:
        path = write_report(runs[0])
    except BadInput as error:
        raise BadInput(f"RUNS: {runs[0]}: {error}") from error
    print(path)


def _write_study(runs: Sequence[Path], output: Path) -> None:
    if output.suffix not in (".html", ".md"):
        raise BadInput(f"--output: {output} ends in neither .html nor .md")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"--output: no directory {output.absolute().parent}")
    from neuronal_ray.report.study_page import read_studies, study_markdown, study_page  # imports torch

    study = read_studies(runs)
    write_text(output, study_page(study) if output.suffix == ".html" else study_markdown(study))


if __name__ == "__main__":
    sys.exit(main())
