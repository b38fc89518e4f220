"""Readers of the files that runs and sweeps leave behind: read whole and checked, for the reports."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.report.schemas import ALLOCATION, RESULTS, SEARCH, Candidate, Result

T = TypeVar("T")
FORMAT = 1
FILES = ("pruning.json", "allocation.parquet", "search.parquet")


@dataclass(frozen=True, kw_only=True)
class SearchStep:
    """One step of the search; `noun` is what its candidates vary, `seconds` the wall time of all of them together."""

    name: str
    noun: str
    selected: Candidate
    candidates: tuple[Candidate, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LinearSparsity:
    """The weights removed from one linear; `row_pruned` is int32 [out]."""

    block: int
    path: str
    columns: int
    pruned: int
    row_pruned: NDArray[np.int32]

    @property
    def weights(self) -> int:
        """Number of weights of the linear."""
        return len(self.row_pruned) * self.columns


@dataclass(frozen=True, kw_only=True)
class Score:
    """Perplexities on one text, infinite on overflow; `baselines` are other plans of the same budget."""

    name: str
    dense: float
    baselines: Mapping[str, float]
    pruned: float
    windows: int
    sequence_length: int


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Values of one benchmark: of the pruned model, and of the other plans by name; an accuracy is a fraction."""

    name: str
    metric: str
    value: float
    others: Mapping[str, float]
    rows: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that a report shows; `target` and `achieved` are fractions removed.

    `additions` name the row step, the refinement and the pattern, where the run has them.
    """

    model: str
    method: str
    allocation: str
    additions: tuple[str, ...]
    mode: str
    target: float
    achieved: float
    pruned: int
    prunable: int
    steps: tuple[SearchStep, ...]
    scores: tuple[Score, ...]
    benchmarks: tuple[Benchmark, ...]
    seconds: Mapping[str, float]
    calibration: Mapping[str, object]
    versions: Mapping[str, object]
    devices: tuple[str, ...]
    config: Mapping[str, object]
    linears: tuple[LinearSparsity, ...]


def read_run(directory: Path) -> Run:
    """Read the files of a run. Raises BadInput that names what is missing or malformed."""
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise BadInput(f"no {' and no '.join(missing)} there, expected a directory that neuronal-ray prune wrote")
    try:
        document = json.loads((directory / "pruning.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"pruning.json is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise BadInput(f'pruning.json is of another format, expected an object with "format": {FORMAT}')
    sparsity = _get(document, "sparsity", dict)
    search = _get(document, "search", dict)
    evaluation = _get(document, "evaluation", dict)
    seconds = _get(document, "seconds", dict)
    measured = {name: _get(evaluation, name, dict) for name in evaluation}
    candidates = _candidates(directory / "search.parquet")
    return Run(
        model=_get(document, "model", str),
        method=_get(document, "method", str),
        allocation=_get(document, "allocation", str),
        additions=tuple(_additions(document)),
        mode=_get(document, "mode", str),
        target=_get(sparsity, "target", float),
        achieved=_get(sparsity, "achieved", float),
        pruned=_get(sparsity, "pruned", int),
        prunable=_get(sparsity, "prunable", int),
        steps=tuple(_step(name, _get(search, name, dict), candidates) for name in search),
        scores=tuple(_score(name, node) for name, node in measured.items() if "rows" not in node),
        benchmarks=tuple(_benchmark(name, node) for name, node in measured.items() if "rows" in node),
        seconds={stage: _get(seconds, stage, float) for stage in seconds},
        calibration=_get(document, "calibration", dict),
        versions=_get(document, "versions", dict),
        devices=tuple(str(device) for device in _get(document, "devices", list)),
        config=_get(document, "config", dict),
        linears=read_linears(directory / "allocation.parquet"),
    )


def _additions(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the row step, the refinement and the pattern, where there are any."""
    if document.get("row_step") is not None:
        yield f"{_get(document, 'row_step', str)} rows"
    for key, absent in (("refinement", "none"), ("pattern", "unstructured")):
        value = _get(document, key, str)
        if value != absent:
            yield value


def _get(node: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """Return a value of pruning.json, checked for its type."""
    value = node.get(key)
    given: object = float(value) if kind is float and type(value) is int else value  # JSON has one kind of number
    if not isinstance(given, kind) or isinstance(given, bool):
        raise BadInput(f"pruning.json: {key!r} is {value!r:.60}, expected {kind.__name__}")
    return given


def _step(name: str, node: Mapping[str, Any], candidates: Sequence[Candidate]) -> SearchStep:
    mine = tuple(candidate for candidate in candidates if candidate.step == name)
    selected = [candidate for candidate in mine if candidate.selected]
    lam = _get(node, "selected", float)
    if {candidate.lam for candidate in selected} != {lam}:
        given = ", ".join(f"{candidate.lam:g}" for candidate in selected) or "none"
        raise BadInput(f"search.parquet selects {given} in the {name} step, expected {lam:g} as in pruning.json")
    return SearchStep(
        name=name,
        noun=_get(node, "noun", str) if "noun" in node else "lambda",  # older files do not say
        selected=selected[0],
        candidates=mine,
        seconds=_get(node, "seconds", float),
    )


def _benchmark(name: str, node: Mapping[str, Any]) -> Benchmark:
    metric = next(iter(node), "")
    return Benchmark(
        name=name,
        metric=metric,
        value=_get(node, metric, float),
        others={plan: _get(value, metric, float) for plan, value in node.items() if isinstance(value, dict)},
        rows=_get(node, "rows", int),
    )


def _score(name: str, node: Mapping[str, Any]) -> Score:
    plans = {plan: _perplexity(_get(node, plan, dict)) for plan, value in node.items() if isinstance(value, dict)}
    if "dense" not in plans:
        raise BadInput(f"pruning.json: 'evaluation' of {name!r} has no 'dense', expected its perplexity")
    return Score(
        name=name,
        dense=plans.pop("dense"),
        baselines=plans,
        pruned=_perplexity(node),
        windows=_get(node, "windows", int),
        sequence_length=_get(node, "sequence_length", int),
    )


def _perplexity(node: Mapping[str, Any]) -> float:
    if "perplexity" in node and node["perplexity"] is None:
        return math.inf  # JSON has no number for it
    value = _get(node, "perplexity", float)
    if value <= 0:
        raise BadInput(f"pruning.json: 'perplexity' is {value:g}, expected more than 0")
    return value


def _candidates(path: Path) -> tuple[Candidate, ...]:
    return tuple(Candidate(lam=row.pop("lambda"), **row) for row in _table(path, SEARCH).to_pylist())


def read_linears(path: Path) -> tuple[LinearSparsity, ...]:
    """Read the linears of an allocation.parquet, or of a plan of a sweep. Raises BadInput for any other file."""
    table = _table(path, ALLOCATION)
    if table.num_rows == 0:
        raise BadInput(f"{path.name} has no rows, expected one per linear")
    linears = []
    for head, row in zip(table.drop_columns(["row_pruned"]).to_pylist(), table.column("row_pruned"), strict=True):
        num_rows = head.pop("rows")
        row_pruned = row.values.to_numpy(zero_copy_only=False)  # int32 [out]
        if head["columns"] < 1 or row_pruned.min(initial=0) < 0 or row_pruned.max(initial=0) > head["columns"]:
            raise BadInput(f"{path.name}: block {head['block']} {head['path']} lost more weights than a row has")
        if not 0 < len(row_pruned) == num_rows or row_pruned.sum() != head["pruned"]:
            given = f"{len(row_pruned)} rows that lost {row_pruned.sum():.0f}"
            expected = f"{num_rows} rows that lost {head['pruned']}"
            raise BadInput(f"{path.name}: block {head['block']} {head['path']} has {given}, expected {expected}")
        linears.append(LinearSparsity(row_pruned=row_pruned, **head))
    return tuple(linears)


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read the results of sweeps' directories. Raises BadInput that names a file which cannot be read."""
    results = []
    for path in paths:
        files = sorted((path / "results").glob("*.parquet"))
        if not files:
            raise BadInput(f"RUNS: {path} has no results/*.parquet; is it the --output of neuronal-ray sweep?")
        for file in files:
            try:
                table = pq.read_table(file)
            except (pa.ArrowInvalid, OSError) as error:
                reason = " ".join(str(error).split())
                raise BadInput(
                    f"RUNS: {file} cannot be read ({reason}); `neuronal-ray sweep FILE --resume` writes it again from "
                    "its journal"
                ) from error
            if table.schema.names != RESULTS.names:
                raise BadInput(f"RUNS: {file} has other columns than this version writes; run the sweep again")
            results += [Result(**row) for row in table.to_pylist()]
    return results


def _table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema`, in its types. Raises BadInput for columns that are missing or have nulls."""
    try:
        table = pq.read_table(path)
        missing = [name for name in schema.names if name not in table.column_names]
        if missing:
            raise BadInput(f"{path.name} lacks the column {', '.join(missing)}, expected {', '.join(schema.names)}")
        table = table.select(schema.names).cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise BadInput(f"{path.name} cannot be read, expected {', '.join(schema.names)}: {error}") from error
    nulls = [name for name in schema.names if table.column(name).null_count]
    if nulls:
        raise BadInput(f"{path.name} has nulls in {', '.join(nulls)}, expected none")
    return table
