"""The scores of one model on texts and benchmarks, computed over the pool: one task per benchmark, several per text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.plan import Plan
from neuronal_ray.data.window_start import AUTO
from neuronal_ray.evaluate.benchmark_names import MEAN, ZERO_SHOT
from neuronal_ray.evaluate.perplexity import perplexity
from neuronal_ray.evaluate.scores import PERPLEXITY, BenchmarkSettings, Score, mean_score
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.worker import Worker


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The windows of a text; `start` is how each begins: papers or bos, auto where that is to be decided."""

    tokens: Int64[Tensor, "windows length"]
    start: str


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """The texts, as windows by name, and the benchmarks that a model is evaluated on."""

    windows: Mapping[str, Windows] = field(default_factory=dict)
    benchmarks: tuple[str, ...] = ()
    settings: BenchmarkSettings = field(default_factory=BenchmarkSettings)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of texts, then of benchmarks."""
        return (*self.windows, *self.benchmarks)

    @property
    def undecided(self) -> Windows | None:
        """The windows of the first text whose start is to be decided."""
        return next((text for text in self.windows.values() if text.start == AUTO), None)

    def without(self, done: set[str]) -> "Evaluations":
        """Return the evaluations whose names are not in `done`."""
        return Evaluations(
            windows={name: text for name, text in self.windows.items() if name not in done},
            benchmarks=tuple(name for name in self.benchmarks if name not in done),
            settings=self.settings,
        )


def _benchmark(worker: Worker, name: str, plan: Plan | None, settings: BenchmarkSettings) -> Steps[None, Score]:
    """Return the score of a benchmark, run by the last shard, which queries the others for what it needs."""
    yield (yield Passing([], None))
    from neuronal_ray.evaluate.benchmarks import run_benchmark  # lm-eval takes seconds to import

    return run_benchmark(worker, name, plan, settings)


def measure(
    pool: Pool, evaluations: Evaluations, plan: Plan | None, progress: Progress, *, label: str
) -> dict[str, Score]:
    """Return the score of the model under `plan` (None: dense) on every text and benchmark, by name.

    If the paper's seven tasks are among them, their mean comes last.
    """
    scores = dict(measured(pool, evaluations, plan, progress, label=label))
    ordered = {name: scores[name] for name in evaluations.names}
    if set(ZERO_SHOT) <= set(scores):
        ordered[MEAN] = mean_score([scores[name] for name in ZERO_SHOT])
    return ordered


def measured(
    pool: Pool, evaluations: Evaluations, plan: Plan | None, progress: Progress, *, label: str
) -> Iterator[tuple[str, Score]]:
    """Yield each name with its score as soon as it is known; each text is a stage of `progress`, so are all benchmarks.

    Benchmarks, the longest tasks, start first.
    """
    names = evaluations.benchmarks
    if names:
        with progress.stage(f"benchmarks: {label}", len(names)) as advance:
            for name, score in zip(
                names, pool.map(ChainTask(_benchmark), names, plan, evaluations.settings), strict=True
            ):
                advance(f"{name}: {score.metric} {score.value:.4g}")
                yield name, score
    for name, windows in evaluations.windows.items():
        value = perplexity(pool, windows.tokens, plan, progress=progress, stage=f"{name}: {label}")
        rows, length = windows.tokens.shape
        yield name, Score(metric=PERPLEXITY, value=value, rows=rows, length=length, window_start=windows.start)
