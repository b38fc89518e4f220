"""Readers of the files that runs and sweeps leave behind: read whole and checked, for the reports."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import checked, parse_json
from neuronal_ray.report.pruning_json import Benchmark, Score, Search, read_document, scores
from neuronal_ray.report.read_tables import read_rows, read_table
from neuronal_ray.report.schemas import ALLOCATION, MAY_BE_NULL, RESULTS, SEARCH, Candidate, Real, Result

_FLAG = "RUNS"
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


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What reports read of a cell's options."""

    settings: dict[str, Any] = field(default_factory=dict)
    block_lambdas: tuple[Real, ...] = ()


def read_run(directory: Path) -> Run:
    """Read the files of a run. Raises BadInput that names what is missing or malformed."""
    missing = [name for name in FILES if not (directory / name).exists()]
    if missing:
        expected = "expected a directory that neuronal-ray prune wrote"
        raise BadInput(f"{_FLAG}: no {' and no '.join(missing)} in {directory}, {expected}")
    path = directory / "pruning.json"
    document = read_document(path, flag=_FLAG)
    candidates = _candidates(directory / "search.parquet")
    on_texts, on_benchmarks = scores(document, place=f"{_FLAG}: {path}")
    return Run(
        model=document.model,
        method=document.method,
        allocation=document.allocation,
        additions=tuple(document.additions),
        mode=document.mode,
        target=document.sparsity.target,
        achieved=document.sparsity.achieved,
        pruned=document.sparsity.pruned,
        prunable=document.sparsity.prunable,
        steps=tuple(_step(name, step, candidates, path) for name, step in document.search.items()),
        scores=on_texts,
        benchmarks=on_benchmarks,
        seconds=document.seconds,
        calibration=document.calibration,
        versions=document.versions,
        devices=document.devices,
        config=document.config,
        linears=read_linears(directory / "allocation.parquet"),
    )


def _step(name: str, step: Search, candidates: Sequence[Candidate], path: Path) -> SearchStep:
    mine = tuple(candidate for candidate in candidates if candidate.step == name)
    selected = [candidate for candidate in mine if candidate.selected]
    if {candidate.lam for candidate in selected} != {step.selected}:
        given = ", ".join(f"{candidate.lam:g}" for candidate in selected) or "none"
        raise BadInput(
            f"{_FLAG}: {path.with_name('search.parquet')} selects {given} in the {name} step, expected "
            f"{step.selected:g} as in pruning.json"
        )
    return SearchStep(name=name, noun=step.noun, selected=selected[0], candidates=mine, seconds=step.seconds)


def _candidates(path: Path) -> tuple[Candidate, ...]:
    table = read_table(path, SEARCH, flag=_FLAG).rename_columns({"lambda": "lam"})
    return tuple(
        checked(row, Candidate, place=f"{_FLAG}: row {number} of {path}")
        for number, row in enumerate(table.to_pylist(), start=1)
    )


def read_linears(path: Path) -> tuple[LinearSparsity, ...]:
    """Read the linears of an allocation.parquet, or of a plan of a sweep. Raises BadInput for any other file."""
    table = read_table(path, ALLOCATION, flag=_FLAG)
    if table.num_rows == 0:
        raise BadInput(f"{_FLAG}: {path} has no rows, expected one per linear")
    linears = []
    for head, row in zip(table.drop_columns(["row_pruned"]).to_pylist(), table.column("row_pruned"), strict=True):
        num_rows = head.pop("rows")
        row_pruned = row.values.to_numpy(zero_copy_only=False)  # int32 [out]
        if head["columns"] < 1 or row_pruned.min(initial=0) < 0 or row_pruned.max(initial=0) > head["columns"]:
            raise BadInput(f"{_FLAG}: {path}: block {head['block']} {head['path']} lost more weights than a row has")
        if not 0 < len(row_pruned) == num_rows or row_pruned.sum() != head["pruned"]:
            given = f"{len(row_pruned)} rows that lost {row_pruned.sum():.0f}"
            expected = f"{num_rows} rows that lost {head['pruned']}"
            raise BadInput(f"{_FLAG}: {path}: block {head['block']} {head['path']} has {given}, expected {expected}")
        linears.append(LinearSparsity(row_pruned=row_pruned, **head))
    return tuple(linears)


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read the results of sweeps' directories. Raises BadInput that names a file which cannot be read."""
    results: list[Result] = []
    for path in paths:
        files = sorted((path / "results").glob("*.parquet"))
        if not files:
            raise BadInput(f"{_FLAG}: {path} has no results/*.parquet; is it the --output of neuronal-ray sweep?")
        for file in files:
            rows = read_rows(file, RESULTS, Result, flag=_FLAG, may_be_null=MAY_BE_NULL)
            for number, row in enumerate(rows, start=1):
                place = f"{_FLAG}: config in row {number} of {file}"
                checked(parse_json(row.config, place=place), _Options, place=place)
            results += rows
    return results
