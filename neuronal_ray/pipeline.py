"""Pruning from top to bottom: text, statistics, ranking, allocation, final masks, evaluation, files."""

import hashlib
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray import __version__, plugins
from neuronal_ray.allocations import Allocation, Problem
from neuronal_ray.config import PruneConfig, RunConfig
from neuronal_ray.core.layout import Group
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import Statistic
from neuronal_ray.data.calibration import calibration_tokens
from neuronal_ray.data.evaluation import evaluation_name, evaluation_windows
from neuronal_ray.evaluation.perplexity import perplexity, split_windows
from neuronal_ray.models.checkpoint import (
    Checkpoint,
    copy_checkpoint,
    load_encoder,
    open_checkpoint,
    resolve_model,
)
from neuronal_ray.output import write_allocation, write_json, write_search
from neuronal_ray.pool import Pool
from neuronal_ray.progress import Progress
from neuronal_ray.search import Search
from neuronal_ray.worker import Worker, chunk_sequences

_DEFAULT_LENGTH = 2048
_PACKAGES = ("torch", "transformers", "datasets", "ray")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that can be read and checked before any weight is loaded."""

    checkpoint: Checkpoint
    sequence_length: int
    calibration: Int64[Tensor, "samples length"]
    windows: Mapping[str, Int64[Tensor, "windows length"]]


def prepare(config: PruneConfig) -> Inputs:
    """Read and check the checkpoint's headers, the calibration text and the evaluation text."""
    for kind, name in (("method", config.method), ("allocation", config.allocation)):
        module = plugins.load(kind + "s", name)
        function = module.score if kind == "method" else module.allocate
        plugins.check_settings(function, config.settings_of(kind), owner=kind)
    for name in set(_flag_settings(config)) & set(config.settings_of("allocation")):
        raise ValueError(f"--set allocation.{name}: has a flag of its own (see --help)")
    checkpoint = open_checkpoint(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
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
    return Inputs(checkpoint=checkpoint, sequence_length=length, calibration=calibration, windows=windows)


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
    method = plugins.load("methods", config.method)
    if config.mode == "paper":
        rank_once(pool, inputs.calibration if method.NEEDS_INPUTS else None, progress)
    search = Search(pool, inputs.calibration[: config.search_samples], mode=config.mode, progress=progress)
    problem = Problem(layout=layout, target=config.sparsity, mode=config.mode, tries=search.tries)
    allocation = allocate(config, problem)

    def finalize(plan: Plan) -> None:
        if config.final_stream == "pruned":
            rank_on_pruned_stream(config, pool, inputs.calibration, plan, progress)

    plans = {"pruned": allocation.plan}
    if config.baselines:
        plans = {name: plan for name, plan in allocation.baselines.items() if plan is not allocation.plan} | plans
    evaluation = evaluate_plans(pool, inputs.windows, plans, finalize, progress)
    zeros = write_model(inputs.checkpoint, pool, allocation.plan, staging, progress)
    write_allocation(staging / "allocation.parquet", layout, allocation.plan)
    write_search(staging / "search.parquet", search.candidates, {step.name: step.selected for step in allocation.steps})
    summary = {
        "format": 1,
        "model": config.model,
        "method": config.method,
        "allocation": config.allocation,
        "mode": config.mode,
        "sparsity": {
            "target": config.sparsity,
            "achieved": zeros / layout.prunable,
            "pruned": zeros,
            "prunable": layout.prunable,
        },
        "search": {
            step.name: {
                "selected": step.selected,
                "candidates": [
                    {"lambda": lam, "alignment": score if math.isfinite(score) else None}
                    for lam, score in zip(step.lambdas, step.misalignments, strict=True)
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


def rank_once(pool: Pool, calibration: Int64[Tensor, "samples length"] | None, progress: Progress) -> None:
    """One dense pass over the calibration text, spread over the workers, then one ranking on each of them."""
    statistics: dict[Group, Statistic] | None = None
    if calibration is not None:
        statistics = {}
        parts = calibration.split(chunk_sequences(calibration.shape[1]))
        with progress.stage("statistics", len(parts)) as advance:
            for observed in pool.map(Worker.observe, parts):
                for group, statistic in observed.items():
                    statistics[group] = statistics[group].merge(statistic) if group in statistics else statistic
                advance("")
    with progress.stage("ranking", 1) as advance:
        pool.each(Worker.rank, statistics)
        advance("")


def rank_on_pruned_stream(
    config: PruneConfig, pool: Pool, calibration: Int64[Tensor, "samples length"], plan: Plan, progress: Progress
) -> None:
    """Take the final scores block after block behind pruned predecessors; every worker does the same."""
    chunk = 1 if config.mode == "authors" else chunk_sequences(calibration.shape[1])
    with progress.stage("pruned stream", 1) as advance:
        pool.each(partial(Worker.rank_on_pruned_stream, chunk=chunk), plan, calibration)
        advance("")


def allocate(config: PruneConfig, problem: Problem) -> Allocation:
    """The plan of the allocation asked for, with its settings."""
    settings = config.settings_of("allocation") | _flag_settings(config)
    allocation: Allocation = plugins.load("allocations", config.allocation).allocate(problem, **settings)
    allocation.plan.check(problem.layout)
    return allocation


def _flag_settings(config: PruneConfig) -> dict[str, object]:
    """The settings of the allocation that have flags of their own."""
    if config.allocation != "neuronal":
        return {}
    return {
        "steps": config.neuronal_steps,
        "block_lambdas": config.block_lambdas,
        "row_lambdas": config.row_lambdas,
    }


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
