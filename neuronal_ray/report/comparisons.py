"""The comparisons of a report on sweeps: the damage of each variant relative to another, case by case.

Damage is ln(perplexity / perplexity of the dense model). A case is a model, a sparsity, a seed and a text, with the
perplexity of each variant, all of one window start. Ratios of damages are averaged geometrically over cases.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from neuronal_ray.report.schemas import DENSE, Result
from neuronal_ray.report.study_tables import Mark, Table, in_title


@dataclass(frozen=True, kw_only=True)
class Case:
    """Perplexities (infinite on overflow) and seconds of the search of cells that differ in their variant alone."""

    sparsity: float
    evaluation: str
    start: str
    dense: float
    perplexity: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def damage(self, variant: str) -> float:
        """Return ln(perplexity / dense perplexity) of a variant."""
        return math.log(self.perplexity[variant] / self.dense)

    def with_best(self, name: str, variants: Sequence[str]) -> "Case":
        """Return the case with one more variant: the one of `variants` with the lowest perplexity here."""
        known = [variant for variant in variants if variant in self.perplexity]
        if not known:
            return self
        best = min(known, key=lambda variant: self.perplexity[variant])
        return Case(
            sparsity=self.sparsity,
            evaluation=self.evaluation,
            start=self.start,
            dense=self.dense,
            perplexity=self.perplexity | {name: self.perplexity[best]},
            seconds=self.seconds | {name: self.seconds[best]},
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A variant against a reference; NaN stands for a value that no case has.

    `cases` have both variants, `compared` of them have a ratio of damages: both damages are positive, and the
    reference did not overflow. A win is a lower perplexity. `perplexity` is the geometric mean of perplexity ratios,
    `seconds` the ratio of the searches' total seconds.
    """

    cases: int
    compared: int
    damage: float
    worst: float
    perplexity: float
    wins: int
    seconds: float


def cases_of(results: Iterable[Result], combinations: Mapping[str, object]) -> list[Case]:
    """Return the cases of all perplexities; `combinations` by cell are equal for cells that can be compared."""
    cases: dict[tuple[object, str, str], Case] = {}
    for result in results:
        if result.method == DENSE or result.metric != "perplexity" or result.dense is None:
            continue
        key = (combinations[result.cell], result.evaluation, result.start)
        new = Case(sparsity=result.sparsity, evaluation=result.evaluation, start=result.start, dense=result.dense)
        case = cases.setdefault(key, new)
        case.perplexity[result.variant] = math.inf if result.value is None else result.value
        case.seconds[result.variant] = result.search_seconds
    return list(cases.values())


def compare(cases: Iterable[Case], variant: str, reference: str) -> Comparison:
    """Compare a variant with a reference over the cases that have both."""
    both = [case for case in cases if {variant, reference} <= set(case.perplexity)]
    finite = [case for case in both if math.isfinite(case.perplexity[reference])]
    ratios = [
        case.damage(variant) / case.damage(reference)
        for case in finite
        if case.damage(variant) > 0 and case.damage(reference) > 0
    ]
    seconds = sum(case.seconds[reference] for case in both)
    return Comparison(
        cases=len(both),
        compared=len(ratios),
        damage=_geometric_mean(ratios),
        worst=max(ratios, default=math.nan),
        perplexity=_geometric_mean([case.perplexity[variant] / case.perplexity[reference] for case in finite]),
        wins=sum(case.perplexity[variant] < case.perplexity[reference] for case in both),
        seconds=sum(case.seconds[variant] for case in both) / seconds if seconds else math.nan,
    )


def comparison_tables(cases: Sequence[Case], references: Iterable[Sequence[str]]) -> list[Table]:
    """Return a table per text and reference; a reference of several variants is the best of them in each case."""
    tables = []
    for members in references:
        name = members[0] if len(members) == 1 else f"the best of {', '.join(members)}"
        known = [case.with_best(name, members) for case in cases]
        variants = list(dict.fromkeys(variant for case in cases for variant in case.perplexity))
        for evaluation, start in dict.fromkeys((case.evaluation, case.start) for case in cases):
            own = [case for case in known if (case.evaluation, case.start) == (evaluation, start)]
            title = f"Damage on {evaluation} relative to {name}{in_title(start)}"
            tables.append(_table(own, variants, name, title))
    return [table for table in tables if table.rows]


def _table(cases: Sequence[Case], variants: Sequence[str], reference: str, title: str) -> Table:
    sparsities = sorted({case.sparsity for case in cases})
    groups = {f"{100 * sparsity:g} %": [c for c in cases if c.sparsity == sparsity] for sparsity in sparsities}
    if len(groups) > 1:
        groups["all"] = list(cases)
    rows, marks = [], []
    for label, group in groups.items():
        for variant in variants:
            comparison = compare(group, variant, reference)
            if comparison.cases:
                rows.append((label, variant))
                marks.append(_marks(comparison))
    return Table(
        title=title,
        words=("Sparsity", "Top-up"),
        columns=("Damage", "Wins", "Worst", "Cases", "Perplexity", "Search seconds"),
        rows=tuple(rows),
        marks=tuple(marks),
        note=f"{reference} is 1; wins are cases of lower perplexity; a case has no ratio of damages where one is not "
        "positive or the reference overflowed",
    )


def _marks(comparison: Comparison) -> tuple[Mark | None, ...]:
    count = (
        f"{comparison.compared} of {comparison.cases}"
        if comparison.compared < comparison.cases
        else str(comparison.cases)
    )
    return (
        _ratio(comparison.damage),
        Mark(value=comparison.wins, text=f"{comparison.wins} of {comparison.cases}"),
        _ratio(comparison.worst),
        Mark(value=comparison.compared, text=count),
        _ratio(comparison.perplexity),
        _ratio(comparison.seconds),
    )


def _ratio(value: float) -> Mark | None:
    return None if math.isnan(value) else Mark(value=value, text=f"{value:.3f}")


def _geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan
