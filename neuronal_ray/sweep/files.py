"""What a sweep leaves behind: a journal that nothing is lost from, plans, and a Parquet data set of results.

`DIR/journal.jsonl` has every result when it comes; `DIR/results/*.parquet`, one file per cell, is what pandas, polars
and duckdb read: one row per cell and evaluation. `DIR/plans/*.parquet` are the allocations.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from neuronal_ray.cli.atomic import write_json
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Plan
from neuronal_ray.prune.files import read_allocation, write_allocation
from neuronal_ray.sweep.config import Study

FORMAT = 1
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell and evaluation. `value` is nan where `problem` says why; `rows` are windows or questions.

    `seconds` is what allocation and refinement took, without the method's own statistics and ranking; trials that an
    earlier cell had asked for count as if they had been repeated. `evaluation_seconds` is of this evaluation.
    """

    cell: str
    variant: str
    model: str
    method: str
    allocation: str
    row_step: str | None
    refinement: str
    pattern: str
    mode: str
    criterion: str
    sparsity: float
    achieved: float
    seed: int
    calibration: str
    calibration_samples: int
    search_samples: int
    sequence_length: int
    block_lambda: float | None
    row_lambda: float | None
    evaluation: str
    metric: str
    value: float | None
    error: float | None
    rows: int
    dense: float | None
    seconds: float
    search_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    device: str
    problem: str | None
    config: str
    versions: str


_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def _arrow(hint: Any) -> pa.DataType:
    """The column of a field; what may be absent is null there."""
    (kind,) = [one for one in get_args(hint) or (hint,) if one is not NoneType]
    return _ARROW[kind]


SCHEMA = pa.schema([(name, _arrow(hint)) for name, hint in get_type_hints(Row).items()])


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell's plan (None: the dense model) and how it was found: per step name, lambdas, scores and the selected."""

    plan: Plan | None
    steps: Sequence[Mapping[str, Any]]
    seconds: float
    search_seconds: float


@dataclass
class Store:
    """The directory of one sweep."""

    path: Path
    rows: dict[tuple[str, str], Row] = field(default_factory=dict)
    _planned: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def _journal(self) -> Path:
        return self.path / "journal.jsonl"

    def done(self, cell: str) -> set[str]:
        """Evaluations of a cell that have their result; an overflow is one."""
        return {name for known, name in self.rows if known == cell}

    def planned(self, cell: str, layout: Layout) -> Planned | None:
        """The plan that an earlier run found for a cell."""
        event = self._planned.get(cell)
        path = self._plan_path(cell)
        if event is None or not path.is_file():
            return None
        found = read_allocation(path, layout)
        asked = {Linear(block, name): rate for block, name, rate in event["asked"]}
        plan = Plan(found.removed, lower_ties_first=event["lower_ties_first"], asked=asked)
        return Planned(
            plan=plan, steps=event["steps"], seconds=event["seconds"], search_seconds=event["search_seconds"]
        )

    def keep_plan(self, cell: str, layout: Layout, planned: Planned) -> None:
        """Write a plan and note it."""
        assert planned.plan is not None
        path = self._plan_path(cell)
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        write_allocation(temporary, layout, planned.plan)
        temporary.replace(path)
        asked = [(linear.block, linear.path, rate) for linear, rate in planned.plan.asked.items()]
        event = {
            "steps": list(planned.steps),
            "seconds": planned.seconds,
            "search_seconds": planned.search_seconds,
            "lower_ties_first": planned.plan.lower_ties_first,
            "asked": asked,
        }
        self._planned[cell] = event
        self._note({"event": "planned", "cell": cell} | event)

    def keep(self, row: Row) -> None:
        """Note one result."""
        self.rows[row.cell, row.evaluation] = row
        self._note({"event": "result", "row": asdict(row)})

    def publish(self, cell: str) -> None:
        """Write the rows of a cell to its file of the data set."""
        rows = [asdict(row) for (known, _), row in self.rows.items() if known == cell]
        path = self.path / "results" / f"{cell}.parquet"
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
        temporary.replace(path)

    def _plan_path(self, cell: str) -> Path:
        return self.path / "plans" / f"{cell}.parquet"

    def _note(self, event: Mapping[str, Any]) -> None:
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def read_journal(self) -> None:
        """Take up what is noted; a last line that was cut off is dropped."""
        if not self._journal.is_file():
            return
        text = self._journal.read_bytes()
        whole, _, cut = text.rpartition(b"\n")
        for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise BadInput(f"--resume: line {number} of {self._journal} cannot be read ({error})") from error
        if cut:
            with self._journal.open("r+b") as file:
                file.truncate(len(whole) + 1 if whole else 0)

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "planned":
            self._planned[event["cell"]] = event
        if event["event"] == "result":
            row = Row(**event["row"])
            self.rows[row.cell, row.evaluation] = row


def open_store(study: Study, *, resume: bool) -> Store:
    """The directory of a sweep, made or taken up again.

    Raises BadInput when it holds another sweep, or this one without --resume. A sweep that has grown since (more
    cells) may be resumed.
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
    cells = {cell.id: {"variant": cell.variant, "options": cell.options()} for cell in study.cells}
    write_json(index, {"format": FORMAT, "title": study.title, "reproduces": list(study.reproduces), "cells": cells})
    store = Store(path)
    store.read_journal()
    for cell in {known for known, _ in store.rows}:
        store.publish(cell)
    return store


def read_results(paths: Iterable[Path]) -> list[Row]:
    """The rows of sweeps' directories. Raises BadInput that names a file which cannot be read."""
    rows = []
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
            if table.schema.names != SCHEMA.names:
                raise BadInput(f"RUNS: {file} has other columns than this version writes; run the sweep again")
            rows += [Row(**row) for row in table.to_pylist()]
    return rows
