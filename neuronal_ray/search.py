"""Trying plans over the pool: one task per candidate, each distinct plan once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.plan import Plan
from neuronal_ray.pool import Pool
from neuronal_ray.progress import Progress
from neuronal_ray.worker import Worker, chunk_sequences


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of search.parquet."""

    step: str
    lam: float
    misalignment: float
    seconds: float


def _timed(worker: Worker, plan: Plan, trial: Callable[[Worker, Plan], Trial]) -> tuple[Trial, float]:
    begin = perf_counter()
    found = trial(worker, plan)
    return found, perf_counter() - begin


class Search:
    """Tries plans on the search sequences; equal plans (row lambda 0, for one) share one trial."""

    def __init__(self, pool: Pool, text: Int64[Tensor, "sequences length"], *, mode: str, progress: Progress) -> None:
        self.candidates: list[Candidate] = []
        self._pool, self._text, self._mode, self._progress = pool, text, mode, progress
        self._known: dict[bytes, Trial] = {}
        self._prepared = False

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        """One Trial per plan, in order."""
        self._prepare()
        new = {plan.digest: (lam, plan) for lam, plan in zip(lambdas, plans, strict=True)}
        new = {digest: item for digest, item in new.items() if digest not in self._known}
        seconds: dict[bytes, float] = {}
        trial_of = Worker.local_trial if self._mode == "authors" else Worker.trial
        with self._progress.stage(f"{step} search", len(new)) as advance:
            results = self._pool.map(_timed, [plan for _, plan in new.values()], trial_of)
            for (digest, (lam, _)), (trial, spent) in zip(new.items(), results, strict=True):
                self._known[digest], seconds[digest] = trial, spent
                advance(f"lambda {lam:g}: misalignment {trial.misalignment:.4g}")
        trials = [self._known[plan.digest] for plan in plans]
        for lam, plan, trial in zip(lambdas, plans, trials, strict=True):
            spent = seconds.pop(plan.digest, 0.0)
            self.candidates.append(Candidate(step=step, lam=lam, misalignment=trial.misalignment, seconds=spent))
        return trials

    def _prepare(self) -> None:
        if self._prepared:
            return
        authors = self._mode == "authors"
        chunk = 1 if authors else chunk_sequences(self._text.shape[1])
        self._pool.each(partial(Worker.set_search_text, chunk=chunk, with_reference=not authors), self._text)
        self._prepared = True
