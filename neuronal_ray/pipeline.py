"""Pruning from top to bottom: text, statistics, ranking, allocation, final masks, evaluation, files."""

import hashlib
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray import __version__, plugins
from neuronal_ray.allocations import Allocation, Problem, Step
from neuronal_ray.composition import Composition, compose
from neuronal_ray.config import PruneConfig, RunConfig
from neuronal_ray.core.layout import Group, Layout
from neuronal_ray.core.pattern import check_pattern
from neuronal_ray.core.plan import Plan, Rates, uniform_rates
from neuronal_ray.core.stats import RunningNorm, Statistic
from neuronal_ray.data.calibration import calibration_tokens
from neuronal_ray.data.evaluation import evaluation_name, evaluation_windows
from neuronal_ray.evaluation.perplexity import perplexity, split_windows
from neuronal_ray.models.checkpoint import (
    Checkpoint,
    copy_checkpoint,
    linear_columns,
    load_encoder,
    open_checkpoint,
    resolve_model,
)
from neuronal_ray.output import write_allocation, write_json, write_search
from neuronal_ray.pool import Pool
from neuronal_ray.progress import Progress
from neuronal_ray.replica import chunk_sequences
from neuronal_ray.rows import search_rows
from neuronal_ray.search import Search
from neuronal_ray.worker import Walk, Worker

_DEFAULT_LENGTH = 2048
_PACKAGES = ("torch", "transformers", "datasets", "ray")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that can be read and checked before any weight is loaded."""

    composition: Composition
    checkpoint: Checkpoint
    sequence_length: int
    calibration: Int64[Tensor, "samples length"]
    windows: Mapping[str, Int64[Tensor, "windows length"]]


def prepare(config: PruneConfig) -> Inputs:
    """Read and check the checkpoint's headers, the calibration text and the evaluation text."""
    composition = compose(config)
    checkpoint = open_checkpoint(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    if composition.recipe.pattern is not None:
        check_pattern(
            linear_columns(checkpoint, trust_remote_code=config.trust_remote_code), composition.recipe.pattern
        )
    length = sequence_length(config, checkpoint)
    calibration = calibration_tokens(
        config.calibration,
        load_encoder(checkpoint.path, trust_remote_code=config.trust_remote_code),
        samples=config.calibration_samples,
        sequence_length=length,
        seed=config.seed,
        vocabulary=checkpoint.config.get_text_config().vocab_size,
    )
    windows = read_windows(config.evaluate, checkpoint, length=length, trust_remote_code=config.trust_remote_code)
    return Inputs(
        composition=composition, checkpoint=checkpoint, sequence_length=length, calibration=calibration, windows=windows
    )


def sequence_length(config: RunConfig, checkpoint: Checkpoint) -> int:
    """The tokens per sequence asked for, or 2048 or the model's context where that is shorter."""
    context = context_length(checkpoint)
    if config.sequence_length is None:
        return min(_DEFAULT_LENGTH, context)
    if config.sequence_length > context:
        raise ValueError(f"--sequence-length: {config.sequence_length} is beyond the model's context of {context}")
    return config.sequence_length


def context_length(checkpoint: Checkpoint) -> int:
    """The longest text that the model was made for; models without positions have no limit."""
    try:
        return int(checkpoint.config.get_text_config().max_position_embeddings)
    except AttributeError:
        return 2**31


def read_windows(
    sources: Sequence[str], checkpoint: Checkpoint, *, length: int, trust_remote_code: bool
) -> dict[str, Int64[Tensor, "windows length"]]:
    """The evaluation windows of every source by its name."""
    windows = {}
    for source in sources:
        name = evaluation_name(source)
        if name in windows:
            raise ValueError(f"--evaluate: two texts are called {name!r}; rename one file")
        windows[name] = evaluation_windows(
            source,
            load_encoder(checkpoint.path, trust_remote_code=trust_remote_code),
            sequence_length=length,
            vocabulary=checkpoint.config.get_text_config().vocab_size,
        )
        if windows[name].shape[1] > context_length(checkpoint):
            raise ValueError(f"--evaluate: rows of {source} are longer than the model's {context_length(checkpoint)}")
    return windows


def run(config: PruneConfig, inputs: Inputs, pool: Pool, staging: Path, progress: Progress) -> dict[str, object]:
    """Prune, evaluate and write everything but the report into `staging`; returns the content of pruning.json."""
    layout = pool.first(Worker.describe)
    composition, calibration = inputs.composition, inputs.calibration
    recipe = composition.recipe
    if composition.released and layout.routed:
        raise ValueError("--mode: authors has no mixtures of experts; use --mode paper")
    gather_and_rank(composition, pool, calibration, progress)
    search = search_for(config, composition, pool, calibration, progress)
    allocation = allocate(config, composition, layout, search)
    walk = Walk(pruned=composition.pruned_stream, released=composition.released)
    stage = "pruned stream" if walk.pruned else "final pass" if recipe.walks else "refinement"
    settled = not walk.pruned and not recipe.walks and recipe.refinement is None  # masks are cuts of the one ranking

    def finalize(plan: Plan) -> None:
        if settled:
            return
        with progress.stage(stage, 1) as advance:
            pool.each(Worker.finish, plan, calibration, walk)
            advance("")

    plans = {"pruned": allocation.plan}
    if config.baselines:
        plans = {
            name: plan for name, plan in allocation.baselines.items() if plan.digest != allocation.plan.digest
        } | plans
    evaluation = evaluate_plans(pool, inputs.windows, plans, finalize, progress)
    zeros = write_model(inputs.checkpoint, pool, allocation.plan, staging, progress)
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
        "evaluation": evaluation,
        "seconds": {name: round(seconds, 3) for name, seconds in progress.seconds.items()},
        "versions": versions(),
        "devices": pool.each(Worker.device_name),
        "config": {key: _plain(value) for key, value in asdict(config).items()},
    }
    write_json(staging / "pruning.json", summary)
    return summary


def gather_and_rank(
    composition: Composition, pool: Pool, calibration: Int64[Tensor, "samples length"], progress: Progress
) -> None:
    """What the search needs of the dense model: one pass over the calibration text, then one ranking per worker."""
    kind, recipe = composition.dense_statistic, composition.recipe
    if kind is not None:
        released = composition.released  # sequence by sequence, as the released code's running mean wants it
        parts = calibration.split(1 if released else chunk_sequences(calibration.shape[1]))
        statistics = gather(pool, parts, RunningNorm if released else kind, progress)
        pool.each(Worker.keep_statistics, statistics)
    if composition.released or recipe.solves:
        return
    with progress.stage("ranking", 1) as advance:
        if recipe.walks:
            pool.each(Worker.rank_on_walk, calibration)
        else:
            pool.each(Worker.rank)
        advance("")


def gather(
    pool: Pool, parts: Sequence[Int64[Tensor, "some length"]], kind: type[Statistic], progress: Progress
) -> dict[Group, Statistic]:
    """The statistics of the dense model over all parts of a text, merged in their order."""
    statistics: dict[Group, Statistic] = {}
    with progress.stage("statistics", len(parts)) as advance:
        for observed in pool.map(Worker.observe, parts, kind):
            for group, statistic in observed.items():
                statistics[group] = statistics[group].merge(statistic) if group in statistics else statistic
            advance("")
    routed = set(pool.first(Worker.describe).routed) & set(statistics)
    return statistics | {group: statistics[group].over(sum(map(len, parts))) for group in routed}


def search_for(
    config: PruneConfig,
    composition: Composition,
    pool: Pool,
    calibration: Int64[Tensor, "samples length"],
    progress: Progress,
) -> Search:
    """The way to ask the model for candidates on the first of the calibration sequences."""
    return Search(
        pool,
        layout=pool.first(Worker.describe),
        calibration=calibration,
        samples=config.search_samples,
        mode=config.mode,
        criterion=composition.criterion,
        solves=composition.recipe.solves,
        progress=progress,
        levels=composition.levels,
        target=composition.target,
    )


def allocate(config: PruneConfig, composition: Composition, layout: Layout, search: Search) -> Allocation:
    """The plan of the allocation asked for, and of the row step after it."""
    problem = Problem(
        layout=layout,
        target=composition.target,
        mode=config.mode,
        probe=search,
        pattern=composition.recipe.pattern,
        criterion=composition.criterion,
        samples=config.search_samples,
        levels=composition.levels,
    )
    allocation: Allocation = plugins.load("allocations", composition.allocation).allocate(
        problem, **composition.settings
    )
    if composition.levels and problem.pattern is None:
        exact = replace(problem, levels=0)
        allocation = replace(allocation, plan=exact.plan(allocation.rates, rows_adapted=False))
    if composition.row_step == "neuronal":
        found = search_rows(
            problem, allocation.rates, allocation.plan, None, config.row_lambdas, search=config.lambda_search
        )
        allocation = _followed(allocation, found.rates, found.plan, steps=(found.step,))
    if composition.row_step == "trim":
        rates = dict(allocation.rates) | search.trim(allocation.plan)
        allocation = _followed(allocation, rates, problem.plan(rates, rows_adapted=True))
    allocation.plan.check(layout)
    uniform = problem.plan(uniform_rates(layout, lambda _: composition.target), rows_adapted=False)
    return replace(allocation, baselines={"uniform": uniform} | allocation.baselines)


def _followed(allocation: Allocation, rates: Rates, plan: Plan, *, steps: tuple[Step, ...] = ()) -> Allocation:
    """`allocation` with a row step after it; its own plan becomes a baseline."""
    baselines = allocation.baselines | {"before rows": allocation.plan}
    return Allocation(plan=plan, rates=rates, steps=allocation.steps + steps, baselines=baselines)


def evaluate_plans(
    pool: Pool,
    windows: Mapping[str, Int64[Tensor, "windows length"]],
    plans: Mapping[str, Plan],
    finalize: Callable[[Plan], None],
    progress: Progress,
) -> dict[str, dict[str, object]]:
    """Perplexity of the dense model and of each plan on each text; the last plan, "pruned", is the result."""
    dense = evaluate_dense(pool, windows, progress)
    results: dict[str, dict[str, object]] = {
        name: measured | {"dense": {"perplexity": measured["perplexity"]}} for name, measured in dense.items()
    }
    for plan_name, plan in plans.items():
        finalize(plan)
        for name, text in windows.items():
            value = _perplexity(pool, text, plan, f"{name}: {plan_name}", progress)
            results[name] |= {"perplexity": value} if plan_name == "pruned" else {plan_name: {"perplexity": value}}
    return results


def evaluate_dense(
    pool: Pool, windows: Mapping[str, Int64[Tensor, "windows length"]], progress: Progress
) -> dict[str, dict[str, object]]:
    """Perplexity of the model as it is on each text."""
    return {
        name: {
            "perplexity": _perplexity(pool, text, None, f"{name}: dense", progress),
            "windows": text.shape[0],
            "sequence_length": text.shape[1],
        }
        for name, text in windows.items()
    }


def _perplexity(
    pool: Pool, text: Int64[Tensor, "windows length"], plan: Plan | None, label: str, progress: Progress
) -> float | None:
    """None when the model overflows, which JSON has no number for."""
    with progress.stage(label, len(split_windows(text))) as advance:
        value = perplexity(pool, text, plan, advance=advance)
    return value if math.isfinite(value) else None


def write_model(checkpoint: Checkpoint, pool: Pool, plan: Plan, staging: Path, progress: Progress) -> int:
    """The checkpoint with the plan's weights zeroed; returns the number of zeros among the prunable weights."""
    with progress.stage("checkpoint", 2) as advance:
        copy_checkpoint(checkpoint, staging)
        advance("copied")
        zeros = pool.first(Worker.write, plan, staging)
        advance("zeroed")
    return zeros


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {"neuronal_ray": __version__, "python": platform.python_version()} | {
        package: version(package) for package in _PACKAGES
    }


def _plain(value: object) -> object:
    """`value` as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
