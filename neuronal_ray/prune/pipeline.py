"""Pruning from top to bottom: text, statistics, ranking, allocation, final masks, evaluation, files."""

from dataclasses import dataclass, replace
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.atomic import write_json
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.emptied import emptied, name_emptied
from neuronal_ray.core.input_zeros import number_of
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import Counts, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem
from neuronal_ray.evaluate.measure import measure
from neuronal_ray.evaluate.scores import Score
from neuronal_ray.prune.compose import Composition
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.files import begin_model, write_allocation, write_model, write_search
from neuronal_ray.prune.input_zeros import check_target
from neuronal_ray.prune.inputs import Inputs, Reader
from neuronal_ray.prune.search import Search
from neuronal_ray.prune.session import Session
from neuronal_ray.prune.summary import describe_result
from neuronal_ray.prune.window_start import with_window_start
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.tasks import model_files
from neuronal_ray.workers.tasks.statistics import device_name


def run(
    config: PruneConfig, inputs: Inputs, pool: Pool, staging: Path, progress: Progress, *, journal: Path | None = None
) -> dict[str, object]:
    """Prune, evaluate and write everything but the report into `staging`; return the content of pruning.json.

    Finished candidates are kept in the folder `journal`, and taken from there.
    """
    pool.each(model_files.check_writable, staging)
    inputs = with_window_start(config, inputs, pool, Reader(), progress, journal=journal)
    session = Session(pool, journal=journal)
    composition, calibration = inputs.composition, inputs.calibration
    selected = plan_run(config, composition, session, calibration, progress)
    layout, allocation, search = session.layout(), selected.allocation, selected.search
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
    summary = describe_result(
        config,
        inputs,
        allocation,
        search,
        results,
        zeros=zeros,
        input_zeros=number_of(selected.zeros),
        without_weights=name_emptied(
            emptied(layout, allocation.plan, selected.zeros), [spec.linear for spec in layout]
        ),
        prunable=layout.prunable,
        seconds=progress.seconds,
        devices=pool.each(device_name),
    )
    write_json(staging / "pruning.json", summary)
    return summary


@dataclass(frozen=True, kw_only=True)
class Selected:
    """The allocation that a run selected, the search that led to it, and the zeros in each row of the input."""

    allocation: Allocation
    search: Search
    zeros: Counts


def plan_run(
    config: PruneConfig,
    composition: Composition,
    session: Session,
    calibration: Int64[Tensor, "samples length"],
    progress: Progress,
) -> Selected:
    """Gather statistics, rank and search: everything up to the plan."""
    layout = session.layout()
    if composition.released and layout.routed:
        raise BadInput("--mode: authors has no mixtures of experts; use --mode paper")
    zeros = session.zeros(progress)
    check_target(composition.target, composition.pruner, zeros=number_of(zeros), prunable=layout.prunable)
    session.hold(composition, calibration, progress, samples=config.search_samples)
    search = session.search(composition, calibration, progress, samples=config.search_samples, mode=config.mode)
    kept = {} if composition.pruner.revive else zeros
    allocation = allocate(config, composition, layout, search, zeros=kept)
    return Selected(allocation=allocation, search=search, zeros=zeros)


def allocate(
    config: PruneConfig, composition: Composition, layout: Layout, search: Search, *, zeros: Counts | None = None
) -> Allocation:
    """Return the plan of the allocation, and of the row step after it; each row loses its `zeros` at least."""
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
        zeros={} if zeros is None else zeros,
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
