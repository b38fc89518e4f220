"""One search in this process, timed by stage, and the forwards of its candidates alone."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.benchmark.device import seconds, settle
from neuronal_ray.benchmark.stages import CALIBRATION, CANDIDATES, OTHER, SEARCH_TEXT, stage_name
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.problem import Allocation
from neuronal_ray.models.blocks import Recording
from neuronal_ray.prune.compose import compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.pipeline import allocate
from neuronal_ray.prune.search import Search
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.final_model import mask
from neuronal_ray.workers.tasks.parallel import InParallel, parallel_tasks
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The model of a search, its device and its text: the first `samples` of `calibration_samples` sequences.

    `lambdas` are those of the block step; the row step has 0 as well.
    """

    name: str
    path: Path
    device: str
    dtype: str
    samples: int
    length: int
    calibration_samples: int
    lambdas: tuple[float, ...] = LAMBDAS
    threads: int | None = None
    offload: bool = False

    @property
    def config(self) -> PruneConfig:
        """The run that has this search: NeuronAL's, by alignment."""
        return PruneConfig(
            model=str(self.path),
            sparsity=0.7,
            mode="paper",
            search_samples=self.samples,
            calibration_samples=self.calibration_samples,
            block_lambdas=self.lambdas,
            row_lambdas=(ROW_LAMBDAS[0], *self.lambdas),
        )

    @property
    def spec(self) -> WorkerSpec:
        """The worker that the search runs on."""
        return WorkerSpec(
            model_path=self.path,
            device=self.device,
            dtype=self.dtype,
            pruner=compose(self.config).pruner,
            threads=self.threads,
            trust_remote_code=False,
            offload=self.offload,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class TimedSearch:
    """Seconds by stage, of the whole and of the candidates, of which `distinct` among `tried`; a plan of each step."""

    seconds: dict[str, float]
    search_s: float
    candidates_s: float
    tried: int
    distinct: int
    plans: tuple[Plan, Plan]


def worker_of(pool: InProcessPool) -> Worker:
    """Return the only worker."""
    return pool.first(_itself)


def _itself(worker: Worker) -> Worker:
    return worker


def random_tokens(setting: Setting, worker: Worker) -> Tokens:
    """Return random calibration text for `setting`, the same each time."""
    shape = (setting.calibration_samples, setting.length)
    return torch.randint(worker.replica.stream.vocabulary, shape, generator=torch.Generator().manual_seed(0))


def search_phases(
    setting: Setting, pool: Pool, tokens: Tokens, *, layout: Layout, progress: Progress, done: Callable[[str], None]
) -> tuple[Allocation, Search]:
    """Do what a run does: statistics and ranking, the search text, the candidates; `done` is called after each.

    Raises BadInput when a candidate's score is not finite: the time of such a search means nothing.
    """
    config = setting.config
    composition, session = compose(config), Session(pool)
    session.hold(composition, tokens, progress, samples=setting.samples)
    done(CALIBRATION)
    search = session.search(composition, tokens, progress, samples=setting.samples, mode=config.mode)
    search.prepare()
    done(SEARCH_TEXT)
    allocation = allocate(config, composition, layout, search)
    done(CANDIDATES)
    overflowed = [candidate for candidate in search.candidates if not math.isfinite(candidate.score)]
    if overflowed:
        raise BadInput(f"--dtype: {len(overflowed)} of {len(search.candidates)} candidates overflowed")
    return allocation, search


def timed_search(setting: Setting, pool: InProcessPool, tokens: Tokens, *, quiet: bool = True) -> TimedSearch:
    """Time `search_phases`, each phase by the activities that the worker's stopwatch counted in it."""
    worker = worker_of(pool)
    watch, stages, totals = worker.stopwatch.seconds, dict[str, float](), dict[str, float]()
    begin = time.perf_counter()

    def done(phase: str) -> None:
        settle(worker.device)
        totals[phase] = time.perf_counter() - begin - sum(totals.values())
        stages.update({stage_name(activity, phase): spent for activity, spent in watch.items()})
        watch.clear()

    watch.clear()
    progress = Progress(quiet=quiet)
    allocation, search = search_phases(setting, pool, tokens, layout=worker.layout, progress=progress, done=done)
    search_s = sum(totals.values())
    return TimedSearch(
        seconds=stages | {OTHER: search_s - sum(stages.values())},
        search_s=search_s,
        candidates_s=totals[CANDIDATES],
        tried=len(search.candidates),
        distinct=round(search.evaluations),
        plans=(allocation.baselines["block"], allocation.plan),
    )


def forwards_alone(worker: Worker, text: Tokens, plan: Plan, *, repeats: int) -> float:
    """Return the seconds of one candidate's forwards through blocks masked before, with nothing observed.

    They are the sum over blocks of the median of `repeats` passes. As in a candidate, the last block's last products
    are left out.
    """
    replica, total = worker.replica, 0.0
    _, recordings = replica.start(text)
    for index in replica.visited(worker.blocks):
        weights = {
            spec.linear: replica.weight(spec) * ~mask(worker, spec.linear, plan).to(worker.device)
            for spec in worker.layout.blocks[index]
        }
        last = index == replica.num_blocks - 1
        with replica.swapped(weights), replica.without_output(index) if last else nullcontext():
            forward = partial(_forward, worker, index, recordings)
            total += median(seconds(worker.device, forward) for _ in range(repeats))
            recordings = forward()
    return total


def forwards_in_parallel(worker: Worker, text: Tokens, plan: Plan, *, repeats: int) -> float:
    """Return `forwards_alone` per candidate when the worker runs as many in parallel as it takes."""
    count = parallel_tasks(worker)
    spent = InParallel(_nth_forwards_alone)(worker, range(count), text, plan, repeats)
    return sum(spent) / count / count


def _nth_forwards_alone(worker: Worker, _: int, text: Tokens, plan: Plan, repeats: int) -> float:
    return forwards_alone(worker, text, plan, repeats=repeats)


def _forward(worker: Worker, index: int, recordings: Sequence[Recording]) -> list[Recording]:
    return [worker.replica.stream.block(index, recording) for recording in recordings]
