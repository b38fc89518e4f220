"""Asking the model over the pool: one task per candidate, each distinct plan once; one per block or run of blocks."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from time import perf_counter
from typing import TypeVar

from jaxtyping import Float64, Int64
from torch import Tensor

from neuronal_ray.allocations import BlockTask
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Layout, Linear, Weighed
from neuronal_ray.core.plan import Plan
from neuronal_ray.pool import Pool
from neuronal_ray.progress import Progress
from neuronal_ray.replica import chunk_sequences
from neuronal_ray.worker import Worker

Result = TypeVar("Result")
Tokens = Int64[Tensor, "sequences length"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of search.parquet; `score` is by the criterion named, lower is better."""

    step: str
    lam: float
    criterion: str
    score: float
    seconds: float


def _timed(worker: Worker, plan: Plan, trial: Callable[[Worker, Plan], Result]) -> tuple[Result, float]:
    begin = perf_counter()
    found = trial(worker, plan)
    return found, perf_counter() - begin


def _timed_together(
    worker: Worker,
    plans: Sequence[Plan],
    tokens: Tokens,
    trials: Callable[[Worker, Sequence[Plan], Tokens], list[Result]],
) -> list[tuple[Result, float]]:
    """The time of candidates that run side by side is shared evenly."""
    begin = perf_counter()
    found = trials(worker, plans, tokens)
    return [(one, (perf_counter() - begin) / len(plans)) for one in found]


def _loss_of(trial: float) -> float:
    return trial


def _misalignment_of(trial: Trial) -> float:
    return trial.misalignment


class Search:
    """Asks for trials, losses, measures (allocations.Probe); equal plans (row lambda 0, for one) share one trial."""

    def __init__(
        self,
        pool: Pool,
        *,
        layout: Layout,
        calibration: Tokens,
        samples: int,
        mode: str,
        solves: bool,
        progress: Progress,
    ) -> None:
        self.candidates: list[Candidate] = []
        self._pool, self._layout, self._calibration, self._progress = pool, layout, calibration, progress
        self._text = calibration[:samples]
        self._authors, self._solves = mode == "authors", solves
        self._known_trials: dict[bytes, Trial] = {}
        self._known_losses: dict[bytes, float] = {}
        self._prepared = False

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        """One Trial per plan, in order."""
        run = partial(self._each, trial=Worker.local_trial if self._authors else Worker.trial)
        if self._solves and not self._authors:
            run = partial(self._together, trials=Worker.solved_trials)
        return self._asked(step, "alignment", lambdas, plans, self._known_trials, run, _misalignment_of)

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        """Mean cross-entropy of the search text under each plan, in order; nats per predicted token."""
        run = partial(self._each, trial=Worker.loss)
        if self._solves:
            run = partial(self._together, trials=Worker.solved_losses)
        return self._asked(step, "loss", lambdas, plans, self._known_losses, run, _loss_of)

    def measure(self, function: Callable[[Sequence[Weighed]], Result]) -> list[Result]:
        """`function` of the linears of every block, in order."""
        return self._collected(
            "measure", self._layout.num_blocks, self._pool.map(Worker.measure, range(self._layout.num_blocks), function)
        )

    def learn(self, function: Callable[[BlockTask], Result]) -> list[Result]:
        """`function` of every block with the search text that enters it, in order."""
        self._prepare()
        if self._solves:
            self._pool.each(Worker.rank_on_walk, self._calibration)
        ranges = self._ranges()
        found = self._collected("learning", len(ranges), self._pool.map(Worker.learn, ranges, function))
        return [result for results in found for result in results]

    def trim(self, plan: Plan) -> dict[Linear, Float64[Tensor, " rows"]]:
        """TRIM's row rates for the linears under `plan`."""
        ranges = self._ranges()
        found = self._collected("rows", len(ranges), self._pool.map(Worker.trim, ranges, plan, self._calibration))
        return {linear: rates for results in found for linear, rates in results.items()}

    def criterion(self, step: str) -> str:
        """What the candidates of `step` were compared by."""
        return next(candidate.criterion for candidate in self.candidates if candidate.step == step)

    def _asked(
        self,
        step: str,
        criterion: str,
        lambdas: Sequence[float],
        plans: Sequence[Plan],
        known: dict[bytes, Result],
        run: Callable[[list[Plan]], Iterator[tuple[Result, float]]],
        score_of: Callable[[Result], float],
    ) -> list[Result]:
        """Run what is not known yet, note every candidate, and answer in order."""
        self._prepare()
        new = {plan.digest: (lam, plan) for lam, plan in zip(lambdas, plans, strict=True)}
        new = {digest: item for digest, item in new.items() if digest not in known}
        seconds: dict[bytes, float] = {}
        with self._progress.stage(f"{step} search", len(new)) as advance:
            results = run([plan for _, plan in new.values()])
            for (digest, (lam, _)), (result, spent) in zip(new.items(), results, strict=True):
                known[digest], seconds[digest] = result, spent
                advance(f"lambda {lam:g}: {criterion} {score_of(result):.4g}")
        found = [known[plan.digest] for plan in plans]
        for lam, plan, result in zip(lambdas, plans, found, strict=True):
            self.candidates.append(
                Candidate(
                    step=step,
                    lam=lam,
                    criterion=criterion,
                    score=score_of(result),
                    seconds=seconds.pop(plan.digest, 0.0),
                )
            )
        return found

    def _each(self, plans: list[Plan], *, trial: Callable[[Worker, Plan], Result]) -> Iterator[tuple[Result, float]]:
        """One task per plan."""
        return self._pool.map(_timed, plans, trial)

    def _together(
        self, plans: list[Plan], *, trials: Callable[[Worker, Sequence[Plan], Tokens], list[Result]]
    ) -> Iterator[tuple[Result, float]]:
        """One task per worker: its plans share the statistics and factorizations of each block."""
        share = -(-len(plans) // self._pool.replicas) or 1
        parts = [plans[start : start + share] for start in range(0, len(plans), share)]
        for found in self._pool.map(_timed_together, parts, self._calibration, trials):
            yield from found

    def _collected(self, name: str, total: int, results: Iterator[Result]) -> list[Result]:
        found = []
        with self._progress.stage(name, total) as advance:
            for result in results:
                found.append(result)
                advance("")
        return found

    def _ranges(self) -> list[range]:
        """Contiguous blocks, one run of them per worker: text passes through a worker's earlier blocks once."""
        blocks, replicas = self._layout.num_blocks, min(self._pool.replicas, self._layout.num_blocks)
        bounds = [blocks * index // replicas for index in range(replicas + 1)]
        return [range(start, stop) for start, stop in pairwise(bounds)]

    def _prepare(self) -> None:
        if self._prepared:
            return
        chunk = 1 if self._authors else chunk_sequences(self._text.shape[1])
        self._pool.each(partial(Worker.set_search_text, chunk=chunk, with_reference=not self._authors), self._text)
        self._prepared = True
