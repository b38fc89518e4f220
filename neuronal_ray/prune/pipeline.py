"""Pruning from top to bottom: text, statistics, ranking, allocation, final masks, evaluation, files."""

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray import __version__
from neuronal_ray.algorithms import registry
from neuronal_ray.cli.config import BenchmarkConfig, PruneConfig, RunConfig
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.lambda_search import search_rows
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.pattern import check_pattern
from neuronal_ray.core.plan import Plan, Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Step
from neuronal_ray.data.calibration import calibration_tokens
from neuronal_ray.data.windows import evaluation_name, evaluation_windows
from neuronal_ray.evaluate.benchmark_names import split_names
from neuronal_ray.evaluate.measure import Evaluations, measure
from neuronal_ray.evaluate.scores import BenchmarkSettings, Score
from neuronal_ray.models.checkpoint import Checkpoint, linear_columns, load_encoder, open_checkpoint, resolve_model
from neuronal_ray.models.output_files import Part, copy_rest, split_parts
from neuronal_ray.prune.compose import Composition, compose
from neuronal_ray.prune.files import write_allocation, write_json, write_search
from neuronal_ray.prune.search import Search
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.replica import shard_blocks
from neuronal_ray.workers.worker import Worker

_DEFAULT_LENGTH = 2048
_PATIENCE_S = 5.0
_PACKAGES = ("torch", "transformers", "datasets", "ray")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything that can be read and checked before any weight is loaded."""

    composition: Composition
    checkpoint: Checkpoint
    sequence_length: int
    calibration: Int64[Tensor, "samples length"]
    evaluations: Evaluations


def held_tokens(config: PruneConfig, inputs: Inputs) -> int:
    """The tokens that pass through the workers as a whole: the search text, or all where blocks follow one another."""
    composition = inputs.composition
    walks = composition.pruned_stream or composition.recipe.walks or composition.row_step == "trim"
    return inputs.calibration.numel() if walks else config.search_samples * inputs.sequence_length


class Reader:
    """Reads and checks what runs need before any weight is loaded; what several runs share is read once."""

    def __init__(self) -> None:
        self._checkpoints: dict[tuple[str, bool], Checkpoint] = {}
        self._calibrations: dict[tuple[object, ...], Int64[Tensor, "samples length"]] = {}
        self._evaluations: dict[tuple[object, ...], Evaluations] = {}

    def prepare(self, config: PruneConfig) -> Inputs:
        """Read and check the checkpoint's headers, the calibration text and the evaluation text."""
        composition = compose(config)
        checkpoint = self._checkpoint(config)
        if composition.recipe.pattern is not None:
            check_pattern(
                linear_columns(checkpoint, trust_remote_code=config.trust_remote_code), composition.recipe.pattern
            )
        length = sequence_length(config, checkpoint)
        return Inputs(
            composition=composition,
            checkpoint=checkpoint,
            sequence_length=length,
            calibration=self._calibration(config, checkpoint, length),
            evaluations=self._evaluated(config, checkpoint, length),
        )

    def _checkpoint(self, config: PruneConfig) -> Checkpoint:
        key = config.model, config.trust_remote_code
        if key not in self._checkpoints:
            self._checkpoints[key] = open_checkpoint(
                resolve_model(config.model), trust_remote_code=config.trust_remote_code
            )
        return self._checkpoints[key]

    def _calibration(self, config: PruneConfig, checkpoint: Checkpoint, length: int) -> Int64[Tensor, "samples length"]:
        key = (checkpoint.path, config.calibration, config.calibration_samples, length, config.seed)
        if key not in self._calibrations:
            self._calibrations[key] = calibration_tokens(
                config.calibration,
                load_encoder(checkpoint.path, trust_remote_code=config.trust_remote_code),
                samples=config.calibration_samples,
                sequence_length=length,
                seed=config.seed,
                vocabulary=checkpoint.config.get_text_config().vocab_size,
            )
        return self._calibrations[key]

    def _evaluated(self, config: PruneConfig, checkpoint: Checkpoint, length: int) -> Evaluations:
        key = (checkpoint.path, config.evaluate, length, config.few_shot, config.task_limit, config.task_data)
        if key not in self._evaluations:
            self._evaluations[key] = read_evaluations(config, config.evaluate, checkpoint, length=length)
        return self._evaluations[key]


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


def read_evaluations(
    config: BenchmarkConfig, names: Sequence[str], checkpoint: Checkpoint, *, length: int
) -> Evaluations:
    """The texts among `names` cut into windows, and the benchmarks, whose local rows are read once to check them."""
    texts, benchmarks = split_names(names)
    settings = BenchmarkSettings(few_shot=config.few_shot, limit=config.task_limit, data=config.task_data)
    windows = read_windows(texts, checkpoint, length=length, trust_remote_code=config.trust_remote_code)
    if benchmarks:
        from neuronal_ray.evaluate.benchmarks import check_benchmarks  # lm-eval takes seconds to import

        check_benchmarks(benchmarks, settings)
    return Evaluations(windows=windows, benchmarks=benchmarks, settings=settings)


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


def run(
    config: PruneConfig, inputs: Inputs, pool: Pool, staging: Path, progress: Progress, *, journal: Path | None = None
) -> dict[str, object]:
    """Prune, evaluate and write everything but the report into `staging`; returns the content of pruning.json.

    Finished candidates are kept in, and taken from, the folder `journal`.
    """
    pool.each(Worker.sees, staging)
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
        "devices": pool.each(Worker.device_name),
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
        raise ValueError("--mode: authors has no mixtures of experts; use --mode paper")
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
        pattern=composition.recipe.pattern,
        criterion=composition.criterion,
        samples=config.search_samples,
        levels=composition.levels,
    )
    allocation: Allocation = registry.load("allocations", composition.allocation).allocate(
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
) -> list[Part]:
    """Begin the files of the checkpoint with the plan's weights zeroed, beside what workers do next; returns them for
    `write_model`.

    Each shard writes files of its own.
    """
    layout = pool.first(Worker.describe)
    shards = [shard_blocks(layout.num_blocks, shard, pool.shards) for shard in range(pool.shards)]
    parts = split_parts(checkpoint, layout, shards, trust_remote_code=trust_remote_code)
    for _ in pool.map(Worker.write_ahead, parts, plan, staging):
        pass
    return parts


def write_model(
    checkpoint: Checkpoint, pool: Pool, parts: Sequence[Part], plan: Plan, staging: Path, progress: Progress
) -> int:
    """Complete the files that were begun, and write the others; returns the zeros among the prunable weights.

    The index of the files comes last.
    """
    zeros: dict[str, int] = {}
    with progress.stage("checkpoint", len(parts)) as advance:
        waiting = True
        while waiting:
            begun = {file: found for some in pool.each(Worker.written, _PATIENCE_S) for file, found in some.items()}
            waiting = None in begun.values()
            for file in sorted(begun.keys() - zeros.keys()):
                if (found := begun[file]) is not None:
                    zeros[file] = found
                    advance(file)
        others = [part for part in parts if part.file not in zeros]
        for part, count in zip(others, pool.map(Worker.write, others, plan, staging), strict=True):
            zeros[part.file] = count
            advance(part.file)
        copy_rest(checkpoint, parts, staging)
    return sum(zeros.values())


def versions() -> dict[str, str]:
    """What the numbers depend on, as far as it is installed: a run in one process needs no ray."""
    found = {"neuronal_ray": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _plain(value: object) -> object:
    """`value` as JSON has it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
