"""What does one variant do to one model? Prunes in this process and evaluates; nothing is written."""

import math
import os
import platform
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from functools import cache
from typing import TYPE_CHECKING

from quality_tables import IN, OUT, Row

from neuronal_ray.cli.options import parse_config
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.workers.tasks.final_model import mask, settle
from neuronal_ray.workers.tasks.statistics import describe, device_name

if TYPE_CHECKING:
    from torch import Tensor

    from neuronal_ray.algorithms.linear_pruner import LinearPruner
    from neuronal_ray.core.plan import Plan
    from neuronal_ray.models.checkpoint import Checkpoint
    from neuronal_ray.workers.pools.protocol import Pool
    from neuronal_ray.workers.spec import WorkerSpec
    from neuronal_ray.workers.worker import Worker


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same in all cells; rows measured with others do not count."""

    calibration_samples: int
    search_samples: int
    sequence_length: int
    max_windows: int


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model directory and its texts, as files or `builtin`."""

    name: str
    path: str
    calibration: str
    in_domain: tuple[str, ...]
    out_of_domain: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One model at one sparsity, calibrated on one draw of sequences."""

    model: Model
    sparsity: float
    seed: int

    @property
    def key(self) -> tuple[str, float, int]:
        """What rows know it by."""
        return self.model.name, self.sparsity, self.seed


def arguments(cell: Cell, settings: Settings, flags: str, *, target: float) -> list[str]:
    """A variant as options of `neuronal_ray.prune`; repr gives the target's every digit."""
    options = {
        "model": cell.model.path,
        "output": "unused",
        "sparsity": repr(target),
        "seed": str(cell.seed),
        "calibration": cell.model.calibration,
        "calibration-samples": str(settings.calibration_samples),
        "search-samples": str(settings.search_samples),
        "sequence-length": str(settings.sequence_length),
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)] + shlex.split(flags)


def configure(cell: Cell, settings: Settings, flags: str, *, target: float) -> PruneConfig:
    """The configuration of a variant. Raises ValueError for flags that are not known."""
    try:
        return parse_config(
            PruneConfig, arguments(cell, settings, flags, target=target), prog=f"quality: {flags!r}", description=""
        )
    except SystemExit as error:
        raise ValueError(f"the flags {flags!r} are not understood") from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """What is known of a model before it is pruned: by domain and text windows, int64 [windows, length], and more."""

    checkpoint: "Checkpoint"
    windows: Mapping[str, Mapping[str, "Tensor"]]
    perplexity: Mapping[str, Mapping[str, float | None]]


@cache
def dense_model(model: Model, settings: Settings) -> Dense:
    """The windows of each text by domain and name, and the dense model's perplexity on each."""
    from neuronal_ray.algorithms.linear_pruner import LinearPruner
    from neuronal_ray.evaluate.inputs import read_windows
    from neuronal_ray.models.checkpoint import open_checkpoint, resolve_model
    from neuronal_ray.workers.pools.in_process import InProcessPool

    checkpoint = open_checkpoint(resolve_model(model.path))
    windows = {}
    for domain, sources in ((IN, model.in_domain), (OUT, model.out_of_domain)):
        read = read_windows(sources, checkpoint, length=settings.sequence_length, trust_remote_code=False)
        windows[domain] = {name: text[: settings.max_windows] for name, text in read.items()}
    pool = InProcessPool(_spec(checkpoint, LinearPruner(method="wanda")))
    perplexities = _perplexities(pool, windows, None)
    if None in [value for values in perplexities.values() for value in values.values()]:
        raise ValueError(f"{model.name}: the dense model overflows")
    return Dense(checkpoint=checkpoint, windows=windows, perplexity=perplexities)


@cache
def draw(model: Model, settings: Settings, seed: int) -> "Tensor":
    """The calibration sequences, int64 [samples, length]."""
    from neuronal_ray.data.calibration import calibration_tokens
    from neuronal_ray.models.checkpoint import load_encoder

    checkpoint = dense_model(model, settings).checkpoint
    return calibration_tokens(
        model.calibration,
        load_encoder(checkpoint.path),
        samples=settings.calibration_samples,
        sequence_length=settings.sequence_length,
        seed=seed,
        vocabulary=checkpoint.config.get_text_config().vocab_size,
    )


def measure(cell: Cell, settings: Settings, flags: str, *, target: float, budget: int | None) -> Row:
    """Prune with one variant and evaluate it. Raises ValueError unless it removes `budget` weights (None: any)."""
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.cli.versions import versions
    from neuronal_ray.prune.compose import compose
    from neuronal_ray.prune.pipeline import allocate
    from neuronal_ray.prune.session import Session
    from neuronal_ray.workers.pools.in_process import InProcessPool
    from neuronal_ray.workers.spec import Walk

    config = configure(cell, settings, flags, target=target)
    composition = compose(config)
    dense = dense_model(cell.model, settings)
    calibration = draw(cell.model, settings, cell.seed)
    pool = InProcessPool(_spec(dense.checkpoint, composition.pruner))
    layout, progress, marks = pool.first(describe), Progress(), [time.perf_counter()]
    session = Session(pool)
    session.hold(composition, calibration, progress, samples=config.search_samples)
    marks.append(time.perf_counter())
    search = session.search(composition, calibration, progress, samples=config.search_samples, mode=config.mode)
    plan = allocate(config, composition, layout, search).plan
    marks.append(time.perf_counter())
    pool.each(settle, plan, calibration, Walk(pruned=composition.pruned_stream, released=composition.released))
    marks.append(time.perf_counter())
    zeros = pool.first(_zeros, plan)
    if budget is not None:
        check_budget(zeros, planned=plan.total, budget=budget, solves=composition.pruner.solves)
    passes = 2 if composition.released else 1  # a candidate of the released code passes through dense weights as well
    stages = ("statistics", "search", "final")
    return {
        "family": dense.checkpoint.config.model_type,
        "parameters": sum(math.prod(stored.shape) for stored in dense.checkpoint.tensors.values()),
        "prunable": layout.prunable,
        "planned": plan.total,
        "zeros": zeros,
        "achieved": zeros / layout.prunable,
        "perplexity": _perplexities(pool, dense.windows, plan),
        "dense": dense.perplexity,
        "seconds": {name: round(end - begin, 3) for name, begin, end in zip(stages, marks, marks[1:], strict=False)},
        "evaluations": search.evaluations,
        "token_forwards": round(search.evaluations * passes * calibration[: config.search_samples].numel()),
        "rounds": search.rounds,
        "versions": versions(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores; {pool.first(device_name)}",
        "date": date.today().isoformat(),
    }


def check_budget(zeros: int, *, planned: int, budget: int, solves: bool) -> None:
    """Raise ValueError for another sparsity than the released code's. A solver also zeroes weights of dead inputs."""
    if planned != budget or zeros < budget or (zeros > budget and not solves):
        raise ValueError(f"{planned} weights planned and {zeros} zero, expected {budget}, as the released code has")


def _zeros(worker: "Worker", plan: "Plan") -> int:
    return sum(int(mask(worker, spec.linear, plan).sum()) for spec in worker.layout)


def _spec(checkpoint: "Checkpoint", pruner: "LinearPruner") -> "WorkerSpec":
    from neuronal_ray.workers.spec import WorkerSpec

    return WorkerSpec(
        model_path=checkpoint.path, device="cpu", dtype="float32", pruner=pruner, threads=1, trust_remote_code=False
    )


def _perplexities(
    pool: "Pool", windows: Mapping[str, Mapping[str, "Tensor"]], plan: "Plan | None"
) -> dict[str, dict[str, float | None]]:
    """By domain and text; None where the model overflows, which JSON has no number for."""
    from neuronal_ray.evaluate.perplexity import perplexity

    found: dict[str, dict[str, float | None]] = {}
    for domain, texts in windows.items():
        values = {name: perplexity(pool, text, plan) for name, text in texts.items()}
        found[domain] = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return found
