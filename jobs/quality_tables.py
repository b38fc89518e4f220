"""Which tables does the page of a quality study show? From rows of rows.jsonl to Markdown; nothing is measured here.

Damage is ln(perplexity / perplexity of the dense model). Ratios of damages are averaged geometrically over cases: one
case is one model, sparsity, seed and text.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

Row = dict[str, Any]
"""One line of rows.jsonl: one variant of one cell. A perplexity of None has overflowed."""

AUTHORS, PAPER, UNIFORM, BEST = "authors", "paper", "uniform", "best"
ABLATION, SOLVER = "ablation: ", "sparsegpt "
IN, OUT = "in-domain", "out-of-domain"
_BEST_FIXED = SOLVER + "best fixed"

_PAGE = """# Quality at equal sparsity

Written by `jobs/quality.py` from its rows; `jobs/quality.toml` has every variant's flags. For each model, sparsity and
draw of calibration sequences (seed) the released code's own NeuronAL with Wanda (`{authors}`) comes first; what it
achieves is the target of all others, to the weight. Damage is ln(perplexity / dense perplexity). "/ X" is the geometric
mean over cases of damage divided by X's: below 1 is better than X. A case is a model, a sparsity, a seed and a text. A
win is a lower perplexity; the worst case is the largest ratio. A case without a ratio (a damage that is not positive,
or X overflowed) counts for wins only; "of" in the column of cases says so. `inf` is an overflow, never a win.

{models}

## Headline

{headline}

## Perplexities

Means over seeds. Text: {texts}.

{perplexities}

## Cost

Token-forwards are tokens times passes through the whole model for the candidates of the search (the released code
passes each through dense weights as well, which counts), relative to the search as published. Seconds are those of the
search, one thread.

{cost}

## Ablations

Ratios against `{best}`.

{ablations}

## Solvers

Under SparseGPT, against the best of its fixed allocations in each single case ({fixed}): it is chosen by the evaluation
text itself, which no method could do. The wins are the cases of less damage.

{solvers}

## Environment

{environment}
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Perplexities by variant of one model at one sparsity and seed on one text, infinite on overflow."""

    model: str
    sparsity: float
    seed: int
    domain: str
    text: str
    dense: float
    perplexity: dict[str, float] = field(default_factory=dict)

    def damage(self, variant: str) -> float:
        """ln(perplexity / dense perplexity)."""
        return math.log(self.perplexity[variant] / self.dense)


@dataclass(frozen=True, kw_only=True)
class Versus:
    """A variant against a reference. Of `cases`, `compared` have a ratio of damages; NaN where there is none."""

    cases: int
    compared: int
    damage: float
    worst: float
    perplexity: float
    wins: int


def cases_of(rows: Iterable[Row]) -> list[Case]:
    """The perplexities of all rows, put side by side."""
    cases: dict[tuple[object, ...], Case] = {}
    for row in rows:
        for domain, texts in row["perplexity"].items():
            for text, value in texts.items():
                names = {"model": row["model"], "sparsity": row["sparsity"], "seed": row["seed"]}
                names |= {"domain": domain, "text": text}
                if tuple(names.values()) not in cases:
                    cases[tuple(names.values())] = Case(dense=row["dense"][domain][text], **names)
                cases[tuple(names.values())].perplexity[row["variant"]] = math.inf if value is None else value
    return list(cases.values())


def versus(cases: Iterable[Case], variant: str, reference: str) -> Versus:
    """Over the cases that have both."""
    both = [case for case in cases if {variant, reference} <= set(case.perplexity)]
    finite = [case for case in both if math.isfinite(case.perplexity[reference])]
    ratios = [
        case.damage(variant) / case.damage(reference)
        for case in finite
        if case.damage(variant) > 0 and case.damage(reference) > 0
    ]
    return Versus(
        cases=len(both),
        compared=len(ratios),
        damage=_geometric_mean(ratios),
        worst=max(ratios, default=math.nan),
        perplexity=_geometric_mean([case.perplexity[variant] / case.perplexity[reference] for case in finite]),
        wins=sum(case.perplexity[variant] < case.perplexity[reference] for case in both),
    )


def render(rows: Sequence[Row], variants: Sequence[str], fixed: Sequence[str]) -> str:
    """The page; `variants` in the order of the tables, `fixed` are the allocations without a search."""
    cases = cases_of(rows)
    there = [name for name in variants if any(row["variant"] == name for row in rows)]
    ablations = [name for name in there if name.startswith(ABLATION)]
    solvers = [name for name in there if name.startswith(SOLVER)]
    plain = [name for name in there if name not in ablations + solvers]
    fixed_solvers = [SOLVER + name for name in fixed]
    for case in cases:
        values = [case.perplexity[name] for name in fixed_solvers if name in case.perplexity]
        if values:
            case.perplexity[_BEST_FIXED] = min(values)
    return _PAGE.format(
        authors=AUTHORS,
        best=BEST,
        fixed=", ".join(fixed),
        models=_models(rows),
        headline=_by_domain(cases, plain, (AUTHORS, UNIFORM)),
        texts=", ".join(f"{text} ({domain})" for domain, text in _distinct((case.domain, case.text) for case in cases)),
        perplexities=_perplexities(cases, there),
        cost=_cost(rows, there),
        ablations=_by_domain(cases, ablations, (BEST,)),
        solvers=_by_domain(cases, solvers, (_BEST_FIXED,)),
        environment=_environment(rows),
    )


def _by_domain(cases: Sequence[Case], variants: Sequence[str], references: Sequence[str]) -> str:
    """A table per domain: each variant against each reference, sparsity by sparsity and over all."""
    groups = {domain: [case for case in cases if case.domain == domain] for domain in (IN, OUT)}
    parts = [
        f"### {domain.capitalize()} text\n\n{_against(group, variants, references)}"
        for domain, group in groups.items()
        if group and variants
    ]
    return "\n\n".join(parts) or "Not measured."


def _against(cases: Sequence[Case], variants: Sequence[str], references: Sequence[str]) -> str:
    columns = ["/ {}", "wins", "worst", "cases", "perplexity / {}"]
    header = ["sparsity", "variant", *(column.format(name) for name in references for column in columns)]
    sparsities = _distinct(case.sparsity for case in cases)
    groups = {f"{sparsity:.0%}": [case for case in cases if case.sparsity == sparsity] for sparsity in sparsities}
    if len(groups) > 1:
        groups["all"] = list(cases)
    lines = []
    for label, group in groups.items():
        for variant in variants:
            compared = [versus(group, variant, reference) for reference in references]
            if any(found.cases for found in compared):
                lines.append([label, variant, *(cell for found in compared for cell in _versus_cells(found))])
    return _table(header, lines, left=2)


def _versus_cells(found: Versus) -> list[str]:
    count = f"{found.compared} of {found.cases}" if found.compared < found.cases else str(found.cases)
    wins = f"{found.wins} of {found.cases}"
    return [_ratio(found.damage), wins, _ratio(found.worst), count, _ratio(found.perplexity)]


def _models(rows: Sequence[Row]) -> str:
    header = ["model", "family", "parameters", "prunable", "seeds", "sparsities, asked and achieved"]
    lines = []
    for name in _distinct(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name and row["variant"] == AUTHORS]
        achieved = {
            sparsity: mean(row["achieved"] for row in own if row["sparsity"] == sparsity)
            for sparsity in _distinct(row["sparsity"] for row in own)
        }
        span = ", ".join(f"{sparsity:.0%}: {value:.2%}" for sparsity, value in achieved.items())
        seeds = ", ".join(map(str, _distinct(row["seed"] for row in own)))
        lines.append([name, own[0]["family"], f"{own[0]['parameters']:,}", f"{own[0]['prunable']:,}", seeds, span])
    return _table(header, lines, left=2)


def _perplexities(cases: Sequence[Case], variants: Sequence[str]) -> str:
    """A table per model: rows are variants, columns sparsities and texts."""
    parts = []
    for model in _distinct(case.model for case in cases):
        own = [case for case in cases if case.model == model]
        texts = _distinct((case.sparsity, case.domain, case.text) for case in own)
        columns = sorted(texts, key=lambda column: column[0])
        grouped = [[case for case in own if (case.sparsity, case.domain, case.text) == column] for column in columns]
        lines = [["dense", *(_number(mean(case.dense for case in group)) for group in grouped)]]
        for variant in variants:
            values = [[case.perplexity[variant] for case in group if variant in case.perplexity] for group in grouped]
            lines.append([variant, *(_number(mean(found)) if found else "-" for found in values)])
        header = [f"{sparsity:.0%} {text}" for sparsity, _, text in columns]
        parts.append(f"### {model}\n\n{_table(['variant', *header], lines)}")
    return "\n\n".join(parts) or "Not measured."


def _cost(rows: Sequence[Row], variants: Sequence[str]) -> str:
    """Over the cells that have both the variant and the published search."""
    header = ["variant", "token-forwards / paper", "evaluations", "rounds", "seconds", "seconds / paper"]
    published = {(row["model"], row["sparsity"], row["seed"]): row for row in rows if row["variant"] == PAPER}
    lines = []
    for variant in variants:
        own = [row for row in rows if row["variant"] == variant]
        cells = [(row, published.get((row["model"], row["sparsity"], row["seed"]))) for row in own]
        pairs = [(row, paper) for row, paper in cells if paper is not None]
        tokens = sum(paper["token_forwards"] for _, paper in pairs)
        seconds = sum(paper["seconds"]["search"] for _, paper in pairs)
        lines.append(
            [
                variant,
                _ratio(sum(row["token_forwards"] for row, _ in pairs) / tokens if tokens else math.nan),
                f"{mean(row['evaluations'] for row in own):.1f}",
                f"{mean(row['rounds'] for row in own):.1f}",
                f"{mean(row['seconds']['search'] for row in own):.2f}",
                _ratio(sum(row["seconds"]["search"] for row, _ in pairs) / seconds if seconds else math.nan),
            ]
        )
    return _table(header, lines)


def _environment(rows: Sequence[Row]) -> str:
    """Every distinct machine, version and setting that the rows came from."""
    dates = sorted({row["date"] for row in rows})
    lines = [f"- date: {dates[0]} to {dates[-1]}" if dates else "- nothing measured"]
    for name in ("machine", "versions", "settings"):
        for value in _distinct(
            ", ".join(f"{key} {item}" for key, item in row[name].items()) if isinstance(row[name], dict) else row[name]
            for row in rows
        ):
            lines.append(f"- {name}: {value}")
    return "\n".join(lines)


def _distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, sorted where they are numbers, else in order of appearance."""
    found = list(dict.fromkeys(values))
    return sorted(found) if all(isinstance(value, int | float) for value in found) else found


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(mean(map(math.log, ratios))) if ratios else math.nan


def _ratio(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1000 else f"{value:.4g}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """The first `left` columns are words, the others numbers."""
    rules = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rules, *lines]) if lines else "Not measured."
