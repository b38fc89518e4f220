"""Texts and benchmarks of one model, spread over the pool: windows in parts, benchmarks whole."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from neuronal_ray.core.plan import Plan
from neuronal_ray.evaluation.benchmark_names import MEAN, ZERO_SHOT
from neuronal_ray.evaluation.perplexity import perplexity_of, split_windows, window_losses
from neuronal_ray.evaluation.scores import PERPLEXITY, BenchmarkSettings, Score, mean_score
from neuronal_ray.pool import Pool, map_side_by_side
from neuronal_ray.progress import Progress
from neuronal_ray.worker import Worker

Windows = Int64[Tensor, "windows length"]


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """What a model is evaluated on."""

    windows: Mapping[str, Windows] = field(default_factory=dict)
    benchmarks: tuple[str, ...] = ()
    settings: BenchmarkSettings = field(default_factory=BenchmarkSettings)

    @property
    def names(self) -> tuple[str, ...]:
        """Texts, then benchmarks."""
        return (*self.windows, *self.benchmarks)

    def without(self, done: set[str]) -> "Evaluations":
        """Those that are not done."""
        return Evaluations(
            windows={name: text for name, text in self.windows.items() if name not in done},
            benchmarks=tuple(name for name in self.benchmarks if name not in done),
            settings=self.settings,
        )


@dataclass(frozen=True)
class _Part:
    """One task: a benchmark, or some windows of a text."""

    name: str
    windows: Windows | None


def _evaluate(
    worker: Worker, part: _Part, plan: Plan | None, settings: BenchmarkSettings
) -> Score | Float64[Tensor, " windows"]:
    if part.windows is not None:
        return window_losses(worker, part.windows, plan)
    from neuronal_ray.evaluation.zeroshot import run_benchmark  # lm-eval takes seconds to import

    return run_benchmark(worker, part.name, plan, settings)


def measure(
    pool: Pool, evaluations: Evaluations, plan: Plan | None, progress: Progress, *, label: str
) -> dict[str, Score]:
    """The score of every text and benchmark, of the model under `plan` (None: dense).

    Where the paper's seven tasks are among them, their mean follows.
    """
    scores = dict(measured(pool, evaluations, plan, progress, label=label))
    ordered = {name: scores[name] for name in evaluations.names}
    if set(ZERO_SHOT) <= set(scores):
        ordered[MEAN] = mean_score([scores[name] for name in ZERO_SHOT])
    return ordered


def measured(
    pool: Pool, evaluations: Evaluations, plan: Plan | None, progress: Progress, *, label: str
) -> Iterator[tuple[str, Score]]:
    """`measure`, one name and score after the other; a stage of `progress` each, one for all benchmarks.

    Benchmarks, the longest tasks, start first. Windows are merged in their order: the bits do not depend on the pool.
    """
    if evaluations.benchmarks:
        parts = [_Part(name, None) for name in evaluations.benchmarks]
        with progress.stage(f"benchmarks: {label}", len(parts)) as advance:
            for part, score in zip(parts, pool.map(_evaluate, parts, plan, evaluations.settings), strict=True):
                assert isinstance(score, Score)
                advance(f"{part.name}: {score.metric} {score.value:.4g}")
                yield part.name, score
    for name, windows in evaluations.windows.items():
        parts = [_Part(name, some) for some in split_windows(windows)]
        losses = []
        with progress.stage(f"{name}: {label}", len(parts)) as advance:
            for found in map_side_by_side(pool, _evaluate, parts, plan, evaluations.settings):
                assert isinstance(found, Tensor)
                losses.append(found)
                advance("")
        value = perplexity_of(torch.cat(losses))
        yield name, Score(metric=PERPLEXITY, value=value, rows=len(windows), length=windows.shape[1])
