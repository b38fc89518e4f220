"""The files beside the weights: pruning.json, allocation.parquet, search.parquet, all in one staged directory."""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Plan, PlanError
from neuronal_ray.prune.search import Candidate

logger = logging.getLogger(__name__)

_ALLOCATION = pa.schema(
    [
        ("block", pa.int32()),
        ("path", pa.string()),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("pruned", pa.int64()),
        ("row_pruned", pa.list_(pa.int32())),
    ]
)
_SEARCH = pa.schema(
    [
        ("step", pa.string()),
        ("lambda", pa.float64()),
        ("criterion", pa.string()),
        ("score", pa.float64()),
        ("selected", pa.bool_()),
        ("seconds", pa.float64()),
    ]
)


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise ValueError when `path` cannot become the output directory."""
    if path.exists() and not overwrite:
        raise ValueError(f"--output: {path} exists already; name another directory or add --overwrite")
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output: {path} is not a directory")
    if path.exists() and any(path.iterdir()) and not (path / "pruning.json").is_file():
        raise ValueError(f"--overwrite: {path} holds no pruning.json, so no earlier run wrote it; remove it yourself")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output: cannot write to {parent}")


def _staging(path: Path) -> Path:
    """Where this process puts what becomes `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A directory beside `path` that takes its place when the body succeeds and vanishes when it does not."""
    path = path.absolute()
    staging = _staging(path)
    missing = [folder for folder in path.parents if not folder.exists()]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise ValueError(f"--output: cannot write to {path.parent}: {error.strerror}") from error
    try:
        yield staging
        if path.exists():
            replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
            path.rename(replaced)
            staging.rename(path)
            shutil.rmtree(replaced)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not path.exists():
            for folder in missing:
                with suppress(OSError):  # somebody else's files
                    folder.rmdir()


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """A file beside `path` that takes its place when the body succeeds and vanishes when it does not."""
    path = path.absolute()
    staging = _staging(path)
    if not path.parent.is_dir():
        raise ValueError(f"--output: no directory {path.parent}")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


@contextmanager
def journaled(path: Path, *, resume: bool) -> Iterator[Path]:
    """The folder of finished candidates beside the output directory `path`; it goes when the body succeeds.

    Without `resume` it starts empty, with it also what a killed run had staged goes. Bad input leaves nothing.
    """
    path = path.absolute()
    folder = path.with_name(f".{path.name}.journal")
    if resume:
        for left in path.parent.glob(f".{path.name}.partial-*"):
            if left.name != _staging(path).name:
                shutil.rmtree(left, ignore_errors=True)
    elif folder.exists():
        logger.warning("an earlier run of %s was not finished; --resume would go on where it was", path)
        shutil.rmtree(folder)
    try:
        yield folder
    except BaseException as error:
        if isinstance(error, ValueError) or not any(file.is_file() for file in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def write_allocation(path: Path, layout: Layout, plan: Plan) -> None:
    """One row per linear: its shape, the weights removed, and how many of them from each output row."""
    rows = [
        {
            "block": spec.linear.block,
            "path": spec.linear.path,
            "rows": spec.rows,
            "columns": spec.columns,
            "pruned": int(plan.removed[spec.linear].sum()),
            "row_pruned": plan.removed[spec.linear].numpy(),
        }
        for spec in layout
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_ALLOCATION), path)


def read_allocation(path: Path, layout: Layout) -> Plan:
    """The plan of an allocation.parquet. Raises PlanError when it does not fit the model."""
    try:
        rows = pq.read_table(path, columns=["block", "path", "row_pruned"]).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise PlanError(f"{path} is not an allocation.parquet: {error}") from error
    plan = Plan({Linear(row["block"], row["path"]): torch.tensor(row["row_pruned"], dtype=torch.int32) for row in rows})
    plan.check(layout)
    return plan


def write_search(path: Path, candidates: Sequence[Candidate], selected: Mapping[str, float]) -> None:
    """One row per candidate, in the order tried."""
    rows = [
        {
            "step": candidate.step,
            "lambda": candidate.lam,
            "criterion": candidate.criterion,
            "score": candidate.score,
            "selected": selected.get(candidate.step) == candidate.lam,
            "seconds": candidate.seconds,
        }
        for candidate in candidates
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=_SEARCH), path)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write atomically."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
