"""The files of a result: the model's, written by the workers, and allocation.parquet and search.parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Plan, PlanError
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.output_files import OutputFile, copy_rest, plan_output_files
from neuronal_ray.report.read_tables import read_table
from neuronal_ray.report.schemas import ALLOCATION, SEARCH, Candidate
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.replica import shard_blocks
from neuronal_ray.workers.tasks import model_files
from neuronal_ray.workers.tasks.statistics import describe

_PATIENCE_S = 5.0


def write_allocation(path: Path, layout: Layout, plan: Plan) -> None:
    """Write one row per linear: its shape, the weights removed, and how many of them from each output row."""
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


def read_allocation(path: Path, layout: Layout, *, flag: str) -> Plan:
    """Return the plan of an allocation.parquet. Raises BadInput when it is none, or does not fit the model."""
    rows = read_table(path, ALLOCATION, flag=flag).to_pylist()
    plan = Plan({Linear(row["block"], row["path"]): torch.tensor(row["row_pruned"], dtype=torch.int32) for row in rows})
    try:
        plan.check(layout)
    except PlanError as error:
        raise BadInput(f"{flag}: {path}: {error}") from error
    return plan


def write_search(path: Path, candidates: Sequence[Candidate], selected: Mapping[str, float]) -> None:
    """Write one row per candidate, in the order tried."""
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


def begin_model(
    checkpoint: Checkpoint, pool: Pool, plan: Plan, staging: Path, *, trust_remote_code: bool = False
) -> list[OutputFile]:
    """Begin to write the model's files under `plan` in the background of the workers' next tasks; see `write_model`.

    Each shard writes files of its own.
    """
    layout = pool.first(describe)
    shards = [shard_blocks(layout.num_blocks, shard, pool.shards) for shard in range(pool.shards)]
    parts = plan_output_files(checkpoint, layout, shards, trust_remote_code=trust_remote_code)
    for _ in pool.map(model_files.write_ahead, parts, plan, staging):
        pass
    return parts


def write_model(
    checkpoint: Checkpoint, pool: Pool, parts: Sequence[OutputFile], plan: Plan, staging: Path, progress: Progress
) -> int:
    """Complete the files that were begun, and write the others; return the zeros among the prunable weights.

    The index of the files comes last.
    """
    zeros: dict[str, int] = {}
    with progress.stage("checkpoint", len(parts)) as advance:
        waiting = True
        while waiting:
            begun = {
                file: found for some in pool.each(model_files.written, _PATIENCE_S) for file, found in some.items()
            }
            waiting = None in begun.values()
            for file in sorted(begun.keys() - zeros.keys()):
                if (found := begun[file]) is not None:
                    zeros[file] = found
                    advance(file)
        others = [part for part in parts if part.file not in zeros]
        for part, count in zip(others, pool.map(model_files.write, others, plan, staging), strict=True):
            zeros[part.file] = count
            advance(part.file)
        copy_rest(checkpoint, parts, staging)
    return sum(zeros.values())
