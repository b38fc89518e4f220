"""Pruning from top to bottom: text, statistics, ranking, allocation, final masks, evaluation, files."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.atomic import write_json
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.cli.versions import versions
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import Plan, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem
from neuronal_ray.evaluate.measure import measure
from neuronal_ray.evaluate.scores import Score
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.output_files import OutputFile, copy_rest, plan_output_files
from neuronal_ray.prune.compose import Composition
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.files import write_allocation, write_search
from neuronal_ray.prune.inputs import Inputs
from neuronal_ray.prune.search import Search, noun_of
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.replica import shard_blocks
from neuronal_ray.workers.tasks import model_files
from neuronal_ray.workers.tasks.statistics import describe, device_name

_PATIENCE_S = 5.0


def run(
    config: PruneConfig, inputs: Inputs, pool: Pool, staging: Path, progress: Progress, *, journal: Path | None = None
) -> dict[str, object]:
    """Prune, evaluate and write everything but the report into `staging`; returns the content of pruning.json.

    Finished candidates are kept in, and taken from, the folder `journal`.
    """
    pool.each(model_files.check_writable, staging)
    session = Session(pool, journal=journal)
    composition, calibration = inputs.composition, inputs.calibration
    found = plan_run(config, composition, session, calibration, progress)
    layout, allocation, search = session.layout(), found.allocation, found.search
    results: dict[str, dict[str, Score]] = {}
    if config.baselines:
        for name, plan in allocation.baselines.items():
            if plan.digest != allocation.plan.digest:
                session.settle(composition, plan, calibration, progress)
                results[name] = measure(pool, inputs.evaluations, plan, progress, label=name)
    session.settle(composition, allocation.plan, calibration, progress)
    parts = begin_model(inputs.checkpoint, pool, allocation.plan, staging, trust_remote_code=config.trust_remote_code)
    results = {"dense": measure(pool, inputs.evaluations, None, progress, label="dense")} | results
    results["pruned"] = measure(pool, inputs.evaluations, allocation.plan, progress, label="pruned")
    zeros = write_model(inputs.checkpoint, pool, parts, allocation.plan, staging, progress)
    write_allocation(staging / "allocation.parquet", layout, allocation.plan)
    write_search(staging / "search.parquet", search.candidates, {step.name: step.selected for step in allocation.steps})
    summary = {
        "format": 1,
        "model": config.model,
        "method": config.method,
        "allocation": composition.allocation,
        "row_step": composition.row_step,
        "refinement": config.refinement,
        "pattern": config.pattern,
        "mode": config.mode,
        "sparsity": {
            "target": composition.target,
            "achieved": zeros / layout.prunable,
            "pruned": zeros,
            "prunable": layout.prunable,
        },
        "search": {
            step.name: {
                "noun": noun_of(step.name),
                "selected": step.selected,
                "candidates": [
                    {"lambda": lam, search.criterion(step.name): score if math.isfinite(score) else None}
                    for lam, score in zip(step.lambdas, step.scores, strict=True)
                ],
                "seconds": progress.seconds[f"{step.name} search"],
            }
            for step in allocation.steps
        },
        "calibration": {
            "source": config.calibration,
            "samples": config.calibration_samples,
            "search_samples": config.search_samples,
            "sequence_length": inputs.sequence_length,
            "seed": config.seed,
            "sha256": hashlib.sha256(inputs.calibration.numpy().tobytes()).hexdigest(),
        },
        "evaluation": evaluation_summary(results),
        "seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()},
        "versions": versions(),
        "devices": pool.each(device_name),
        "config": {key: _plain(value) for key, value in asdict(config).items()},
    }
    write_json(staging / "pruning.json", summary)
    return summary


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a run settled on, and the search that led there."""

    allocation: Allocation
    search: Search


def plan_run(
    config: PruneConfig,
    composition: Composition,
    session: Session,
    calibration: Int64[Tensor, "samples length"],
    progress: Progress,
) -> Found:
    """Statistics, ranking and search: everything up to the plan."""
    layout = session.layout()
    if composition.released and layout.routed:
        raise BadInput("--mode: authors has no mixtures of experts; use --mode paper")
    session.hold(composition, calibration, progress, samples=config.search_samples)
    search = session.search(composition, calibration, progress, samples=config.search_samples, mode=config.mode)
    return Found(allocation=allocate(config, composition, layout, search), search=search)


def allocate(config: PruneConfig, composition: Composition, layout: Layout, search: Search) -> Allocation:
    """The plan of the allocation asked for, and of the row step after it."""
    problem = Problem(
        layout=layout,
        target=composition.target,
        mode=config.mode,
        probe=search,
        pattern=composition.pruner.pattern,
        criterion=composition.criterion,
        samples=config.search_samples,
        levels=composition.levels,
        rows_fixed_by=composition.terms.rows_fixed_by,
        row_step=composition.terms.row_step,
    )
    allocation = composition.allocator.allocate(problem, **composition.settings)
    if composition.levels and problem.pattern is None:
        exact = replace(problem, levels=0)
        allocation = replace(allocation, plan=exact.plan(allocation.rates, rows_adapted=False))
    if composition.rows is not None:
        allocation = composition.rows.spread_rows(problem, allocation, **composition.row_settings)
    allocation.plan.check(layout)
    uniform = problem.plan(uniform_rates(layout, lambda _: composition.target), rows_adapted=False)
    return replace(allocation, baselines={"uniform": uniform} | allocation.baselines)


def evaluation_summary(results: Mapping[str, Mapping[str, Score]]) -> dict[str, dict[str, object]]:
    """Per text or benchmark: the "pruned" model's score, and below it those of the dense model and other plans."""
    names = list(results["dense"])
    return {
        name: results["pruned"][name].summary()
        | {plan: scores[name].value_summary() for plan, scores in results.items() if plan != "pruned"}
        for name in names
    }


def begin_model(
    checkpoint: Checkpoint, pool: Pool, plan: Plan, staging: Path, *, trust_remote_code: bool = False
) -> list[OutputFile]:
    """Begin the files of the checkpoint with the plan's weights zeroed, beside what workers do next; returns them for
    `write_model`.

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
    """Complete the files that were begun, and write the others; returns the zeros among the prunable weights.

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


def _plain(value: object) -> object:
    """`value` as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
