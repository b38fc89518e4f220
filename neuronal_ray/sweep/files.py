"""The directory of a sweep: a journal of everything that is finished, plans, and a Parquet data set of results.

`DIR/journal.jsonl` has every plan and result as soon as it is known; `DIR/results/*.parquet`, one file per cell with a
row per evaluation, is what pandas, polars and DuckDB read; `DIR/plans/*.parquet` are the allocations.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from neuronal_ray.cli.atomic import check_output, staged_file, write_json
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.json_lines import JsonLines
from neuronal_ray.cli.read_files import check_path, checked, parse_json, read_json
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Plan
from neuronal_ray.prune.files import read_allocation, write_allocation
from neuronal_ray.report.schemas import RESULTS, CellId, Count, Rate, Real, Result, Seconds
from neuronal_ray.sweep.config import Study

logger = logging.getLogger(__name__)

FORMAT = 1
_FLAG = "--resume"


@dataclass(frozen=True, kw_only=True)
class SearchedStep:
    """One search of a cell: the score of each of its candidates, None on overflow."""

    name: str
    selected: Real
    lambdas: tuple[Real, ...]
    scores: tuple[Real | None, ...]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell's plan (None: the dense model), and its searches."""

    plan: Plan | None
    steps: tuple[SearchedStep, ...]
    seconds: float
    search_seconds: float


@dataclass(frozen=True, kw_only=True)
class _PlanEntry:
    """What the journal has of a plan; `solver_rates` by block and path."""

    cell: CellId
    steps: tuple[SearchedStep, ...]
    seconds: Seconds
    search_seconds: Seconds
    lower_ties_first: bool
    solver_rates: tuple[tuple[Count, str, Rate], ...]


@dataclass(frozen=True, kw_only=True)
class _ResultEntry:
    """A row of the results in the journal."""

    row: Result


@dataclass(frozen=True, kw_only=True)
class _Cells:
    """What is read of a sweep.json."""

    format: Literal[1]
    cells: dict[CellId, Any]


class Store:
    """The directory of one sweep; `rows` are the results by cell and evaluation."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str], Result] = {}
        self._planned: dict[str, _PlanEntry] = {}
        self._journal = JsonLines(path / "journal.jsonl", flag=_FLAG)

    def done(self, cell: str) -> set[str]:
        """Return the evaluations of a cell that have a result; an overflow is one."""
        return {name for known, name in self.rows if known == cell}

    def is_planned(self, cell: str) -> bool:
        """Tell whether a plan was found for a cell, in this run or an earlier one."""
        return cell in self._planned and self._plan_path(cell).is_file()

    def planned(self, cell: str, layout: Layout) -> Planned | None:
        """Return the plan that was found for a cell."""
        if not self.is_planned(cell):
            return None
        entry, removed = self._planned[cell], read_allocation(self._plan_path(cell), layout, flag=_FLAG).removed
        solver_rates = {Linear(block, name): rate for block, name, rate in entry.solver_rates}
        return Planned(
            plan=Plan(removed, lower_ties_first=entry.lower_ties_first, solver_rates=solver_rates),
            steps=entry.steps,
            seconds=entry.seconds,
            search_seconds=entry.search_seconds,
        )

    def keep_plan(self, cell: str, layout: Layout, planned: Planned) -> None:
        """Write a plan and note it in the journal."""
        assert planned.plan is not None
        with staged_file(self._plan_path(cell)) as staging:
            write_allocation(staging, layout, planned.plan)
        rates = planned.plan.solver_rates.items()
        entry = _PlanEntry(
            cell=cell,
            steps=planned.steps,
            seconds=planned.seconds,
            search_seconds=planned.search_seconds,
            lower_ties_first=planned.plan.lower_ties_first,
            solver_rates=tuple((linear.block, linear.path, rate) for linear, rate in rates),
        )
        self._planned[cell] = entry
        self._journal.append({"event": "planned"} | asdict(entry))

    def keep(self, row: Result) -> None:
        """Note one result in the journal."""
        self.rows[row.cell, row.evaluation] = row
        self._journal.append({"event": "result", "row": asdict(row)})

    def publish(self, cell: str) -> None:
        """Write the rows of a cell to its file of the data set."""
        rows = [asdict(row) for (known, _), row in self.rows.items() if known == cell]
        with staged_file(self.path / "results" / f"{cell}.parquet") as staging:
            pq.write_table(pa.Table.from_pylist(rows, schema=RESULTS), staging)

    def _plan_path(self, cell: str) -> Path:
        return self.path / "plans" / f"{cell}.parquet"

    def read_journal(self) -> None:
        """Take up what an earlier run has noted. Raises BadInput, and changes no file, when it cannot be read."""
        for line in self._journal.read():
            match line.value.get("event"):
                case "planned":
                    entry = checked(line.value, _PlanEntry, place=line.place)
                    self._planned[entry.cell] = entry
                case "result":
                    row = checked(line.value, _ResultEntry, place=line.place).row
                    self.rows[row.cell, row.evaluation] = row
                case event:
                    raise BadInput(f"{line.place}: event is {event!r:.60}, expected planned or result")

    def warn_of_other_code(self, now: Mapping[str, str]) -> None:
        """Say which results of an earlier run were made by other code of this package, or of a plug-in.

        `now` is the version of the code by cell.
        """
        earlier: Counter[str] = Counter()
        for row in self.rows.values():
            place = f"{_FLAG}: versions of {row.cell} in {self.path}"
            known = checked(parse_json(row.versions, place=place), dict[str, str], place=place)
            code = known.get("neuronal_ray", "unknown code")
            earlier[code] += row.cell in now and code != now[row.cell]
        for code, count in (+earlier).items():
            current = ", ".join(sorted(set(now.values())))
            logger.warning("%s: %d results were made by %s and are kept; this is %s", _FLAG, count, code, current)


def find_store(study: Study, *, resume: bool) -> Store:
    """Return the store of a sweep, of which nothing is written yet, before models and texts are read.

    Raises BadInput, and leaves all files as they are, when it holds another sweep, this one without --resume, or
    something that cannot be read. A sweep that has more cells than it had may be resumed.
    """
    path, ids = study.output, {cell.id for cell in study.cells}
    check_path(path, flag="--output")
    index = path / "sweep.json"
    store = Store(path)
    if index.exists():
        earlier = read_json(index, _Cells, flag="--output").cells.keys()
        if not resume:
            raise BadInput(f"--output: {path} holds results already; add --resume to go on, or name another directory")
        if not earlier <= ids:
            lost = len(earlier - ids)
            raise BadInput(f"--output: {path} holds another sweep, with {lost} cells that this one lacks; name another")
        store.read_journal()
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"--output: {path} is no directory of a sweep; name another")
    models = {cell.config.model for cell in study.cells}
    check_output(path, kind="directory", earlier=lambda _: True, models=models)  # nothing in it is replaced
    return store


def open_store(study: Study, *, resume: bool) -> Store:
    """Make the directory of a sweep, or take it up again; see `find_store` and `begin_store`."""
    store = find_store(study, resume=resume)
    begin_store(study, store)
    return store


def begin_store(study: Study, store: Store) -> None:
    """Make the directory of a sweep if it is new; write its index and the results that its journal has."""
    path = store.path
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]  # innermost first
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "sweep.json", _index(study))  # first: a directory that has it can be resumed
    except OSError:  # a full disk
        for folder in missing:
            with suppress(FileNotFoundError):
                folder.rmdir()
        raise
    for folder in (path / "results", path / "plans"):
        folder.mkdir(exist_ok=True)
    for cell in {known for known, _ in store.rows}:
        store.publish(cell)


def _index(study: Study) -> dict[str, object]:
    """Return the content of sweep.json."""
    return {
        "format": FORMAT,
        "title": study.title,
        "reproduces": list(study.reproduces),
        "compare": [list(names) for names in study.compare],
        "cells": {
            cell.id: {"variant": cell.variant, "combination": cell.combination, "options": cell.options()}
            for cell in study.cells
        },
    }
