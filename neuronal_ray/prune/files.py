"""The files beside the weights: pruning.json, allocation.parquet, search.parquet, all in one staged directory."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Plan, PlanError
from neuronal_ray.report.schemas import ALLOCATION, SEARCH, Candidate

logger = logging.getLogger(__name__)


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
    pq.write_table(pa.Table.from_pylist(rows, schema=ALLOCATION), path)


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
    pq.write_table(pa.Table.from_pylist(rows, schema=SEARCH), path)
