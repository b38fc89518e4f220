"""The directory of a sweep: a journal of everything that is finished, plans, and a Parquet data set of results.

`DIR/journal.jsonl` has every plan and result as soon as it is known; `DIR/results/*.parquet`, one file per cell with a
row per evaluation, is what pandas, polars and DuckDB read; `DIR/plans/*.parquet` are the allocations.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from neuronal_ray.cli.atomic import staged_file, write_json
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.json_lines import append_line, read_lines
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Plan
from neuronal_ray.prune.files import read_allocation, write_allocation
from neuronal_ray.report.schemas import RESULTS, Result
from neuronal_ray.sweep.config import Study

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell's plan (None: the dense model) and its searches: name, lambdas, scores and the selected of each step."""

    plan: Plan | None
    steps: Sequence[Mapping[str, Any]]
    seconds: float
    search_seconds: float


@dataclass
class Store:
    """The directory of one sweep; `rows` are the results by cell and evaluation."""

    path: Path
    rows: dict[tuple[str, str], Result] = field(default_factory=dict)
    _planned: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def _journal(self) -> Path:
        return self.path / "journal.jsonl"

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
        entry, removed = self._planned[cell], read_allocation(self._plan_path(cell), layout).removed
        solver_rates = {Linear(block, name): rate for block, name, rate in entry["solver_rates"]}
        return Planned(
            plan=Plan(removed, lower_ties_first=entry["lower_ties_first"], solver_rates=solver_rates),
            steps=entry["steps"],
            seconds=entry["seconds"],
            search_seconds=entry["search_seconds"],
        )

    def keep_plan(self, cell: str, layout: Layout, planned: Planned) -> None:
        """Write a plan and note it in the journal."""
        assert planned.plan is not None
        with staged_file(self._plan_path(cell)) as staging:
            write_allocation(staging, layout, planned.plan)
        entry = {
            "steps": list(planned.steps),
            "seconds": planned.seconds,
            "search_seconds": planned.search_seconds,
            "lower_ties_first": planned.plan.lower_ties_first,
            "solver_rates": [(linear.block, linear.path, rate) for linear, rate in planned.plan.solver_rates.items()],
        }
        self._planned[cell] = entry
        append_line(self._journal, {"event": "planned", "cell": cell} | entry)

    def keep(self, row: Result) -> None:
        """Note one result in the journal."""
        self.rows[row.cell, row.evaluation] = row
        append_line(self._journal, {"event": "result", "row": asdict(row)})

    def publish(self, cell: str) -> None:
        """Write the rows of a cell to its file of the data set."""
        rows = [asdict(row) for (known, _), row in self.rows.items() if known == cell]
        with staged_file(self.path / "results" / f"{cell}.parquet") as staging:
            pq.write_table(pa.Table.from_pylist(rows, schema=RESULTS), staging)

    def _plan_path(self, cell: str) -> Path:
        return self.path / "plans" / f"{cell}.parquet"

    def read_journal(self) -> None:
        """Take up what an earlier run has noted; a damaged line is as if it were not there."""
        for entry in read_lines(self._journal):
            try:
                if entry["event"] == "planned":
                    self._planned[entry["cell"]] = entry
                if entry["event"] == "result":
                    row = Result(**entry["row"])
                    self.rows[row.cell, row.evaluation] = row
            except (KeyError, TypeError):
                continue


def open_store(study: Study, *, resume: bool) -> Store:
    """Make the directory of a sweep, or take it up again.

    Raises BadInput when it holds another sweep, or this one without --resume. A sweep that has more cells than it had
    may be resumed.
    """
    path, ids = study.output, {cell.id for cell in study.cells}
    index = path / "sweep.json"
    if index.is_file():
        try:
            earlier = set(json.loads(index.read_text(encoding="utf-8"))["cells"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"--output: {index} cannot be read ({error}); name another directory") from error
        if not resume:
            raise BadInput(f"--output: {path} holds results already; add --resume to go on, or name another directory")
        if not earlier <= ids:
            lost = len(earlier - ids)
            raise BadInput(f"--output: {path} holds another sweep, with {lost} cells that this one lacks; name another")
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise BadInput(f"--output: {path} is no directory of a sweep; name another")
    try:
        for folder in (path, path / "results", path / "plans"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--output: cannot write to {path}: {error.strerror}") from error
    write_json(index, _index(study))
    store = Store(path)
    store.read_journal()
    for cell in {known for known, _ in store.rows}:
        store.publish(cell)
    return store


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
