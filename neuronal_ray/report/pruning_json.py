"""pruning.json as the report reads it: each key that it shows, with its type and what it can be."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import checked, parse_json, read_text
from neuronal_ray.report.schemas import Count, Rate, Real, Seconds

FORMATS = (1, 2)
"""Those that are read; runs write the last."""

Positive = Annotated[float, Field(gt=0, le=1e300)]


def mode_matters(mode: str, *, searched: bool) -> bool:
    """Return whether the mode has had an effect: without a search, `best` and `paper` do the same."""
    return searched or mode == "authors"


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Fractions and numbers of weights removed."""

    target: Rate
    achieved: Rate
    pruned: Count
    prunable: Count


@dataclass(frozen=True, kw_only=True)
class Search:
    """One step: what its candidates vary (older files do not say), which of them was selected, and the wall time."""

    selected: Real
    seconds: Seconds
    noun: str = "lambda"


@dataclass(frozen=True, kw_only=True)
class Document:
    """The keys that a report shows; `evaluation` by name of a text or benchmark."""

    format: int
    model: str
    method: str
    allocation: str
    refinement: str
    pattern: str
    mode: str
    sparsity: Sparsity
    search: dict[str, Search]
    calibration: dict[str, Any]
    evaluation: dict[str, dict[str, Any]]
    seconds: dict[str, Seconds]
    versions: dict[str, str]
    devices: tuple[str, ...]
    config: dict[str, Any]
    row_step: str | None = None

    @property
    def additions(self) -> Iterator[str]:
        """Yield the row step, the refinement and the pattern, where there are any."""
        if self.row_step is not None:
            yield f"{self.row_step} rows"
        for value, absent in ((self.refinement, "none"), (self.pattern, "unstructured")):
            if value != absent:
                yield value


@dataclass(frozen=True, kw_only=True)
class Score:
    """Perplexities on one text, infinite on overflow; `baselines` are other plans of the same budget."""

    name: str
    dense: float
    baselines: dict[str, float]
    pruned: float
    windows: int
    sequence_length: int
    window_start: str


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Values of one benchmark: of the pruned model, and of the other plans by name; an accuracy is a fraction."""

    name: str
    metric: str
    value: float
    others: dict[str, float]
    rows: int


def read_document(path: Path, *, flag: str) -> Document:
    """Read a pruning.json. Raises BadInput for a file of another format, or in which something cannot be."""
    place = f"{flag}: {path}"
    value = parse_json(read_text(path, flag=flag), place=place)
    version = value.get("format") if isinstance(value, dict) else None
    if version not in FORMATS or isinstance(version, bool | float):
        known = " or ".join(map(str, FORMATS))
        raise BadInput(f'{place} is of another format, expected an object with "format": {known}')
    return checked(value, Document, place=place)


def scores(document: Document, *, place: str) -> tuple[tuple[Score, ...], tuple[Benchmark, ...]]:
    """Return the perplexities and the benchmarks of a document; errors begin with `place`."""
    texts = [(name, entry) for name, entry in document.evaluation.items() if "rows" not in entry]
    benchmarks = [(name, entry) for name, entry in document.evaluation.items() if "rows" in entry]
    return (
        tuple(_score(name, entry, f"{place}: evaluation.{name}") for name, entry in texts),
        tuple(_benchmark(name, entry, f"{place}: evaluation.{name}") for name, entry in benchmarks),
    )


@dataclass(frozen=True, kw_only=True)
class _Perplexity:
    """None is an overflow, as JSON has no number for it."""

    perplexity: Positive | None


@dataclass(frozen=True, kw_only=True)
class _OnText(_Perplexity):
    windows: Count
    sequence_length: Count
    window_start: Literal["papers", "bos"] = "papers"  # older runs do not say


@dataclass(frozen=True, kw_only=True)
class _OnBenchmark:
    rows: Count


def _score(name: str, entry: dict[str, Any], place: str) -> Score:
    pruned = checked(entry, _OnText, place=place)
    plans = {
        plan: _finite(checked(value, _Perplexity, place=f"{place}.{plan}"))
        for plan, value in entry.items()
        if isinstance(value, dict)
    }
    if "dense" not in plans:
        raise BadInput(f"{place}.dense is missing, expected the dense model's perplexity")
    return Score(
        name=name,
        dense=plans.pop("dense"),
        baselines=plans,
        pruned=_finite(pruned),
        windows=pruned.windows,
        sequence_length=pruned.sequence_length,
        window_start=pruned.window_start,
    )


def _finite(known: _Perplexity) -> float:
    return math.inf if known.perplexity is None else known.perplexity


def _benchmark(name: str, entry: dict[str, Any], place: str) -> Benchmark:
    rows = checked(entry, _OnBenchmark, place=place).rows
    metric = next(iter(entry))  # it comes first
    values = {plan: value for plan, value in entry.items() if isinstance(value, dict)}
    return Benchmark(
        name=name,
        metric=metric,
        value=checked(entry[metric], Real, place=f"{place}.{metric}"),
        others={plan: _of(value, metric, f"{place}.{plan}") for plan, value in values.items()},
        rows=rows,
    )


def _of(value: dict[str, Any], metric: str, place: str) -> float:
    if metric not in value:
        raise BadInput(f"{place}.{metric} is missing, expected a number")
    return checked(value[metric], Real, place=f"{place}.{metric}")
