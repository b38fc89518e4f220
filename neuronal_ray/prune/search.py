"""Asking the model over the pool: one task per candidate, each distinct plan once; one per block or run of blocks."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeVar

from jaxtyping import Float64, Int64
from torch import Tensor

from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Layout, Linear, Weighed
from neuronal_ray.core.levels import levels_around
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import BlockTask
from neuronal_ray.prune.journal import Journal, Number
from neuronal_ray.report.schemas import Candidate
from neuronal_ray.workers.pools.protocol import Pool, map_side_by_side
from neuronal_ray.workers.replica import Statistics, chunk_sequences
from neuronal_ray.workers.solved_levels import LevelStore
from neuronal_ray.workers.worker import Worker

Result = TypeVar("Result")
_BY_LAMBDA = ("block", "row")
"""Steps whose candidates are named by their lambda; those of others by their number."""

Tokens = Int64[Tensor, "sequences length"]


def noun_of(step: str) -> str:
    """Return what the candidates of a step vary: lambda, or no more than their number."""
    return "lambda" if step in _BY_LAMBDA else "candidate"


@dataclass
class Answers:
    """What was asked already, by digest of the plan; `prepared`: the workers hold the search text, `with_end`: and
    where the dense model takes it, which divergences are measured from.

    `seconds` that answers took, by criterion and digest.
    """

    trials: dict[bytes, Trial] = field(default_factory=dict)
    losses: dict[bytes, float] = field(default_factory=dict)
    divergences: dict[bytes, tuple[float, ...]] = field(default_factory=dict)
    seconds: dict[tuple[str, bytes], float] = field(default_factory=dict)
    changes: dict[bytes, tuple[float, ...]] = field(default_factory=dict)
    prepared: bool = False
    with_end: bool = False
    excerpts: set[range] = field(default_factory=set)
    journal: Journal | None = None

    @classmethod
    def kept(cls, journal: Journal) -> "Answers":
        """Those of an earlier run, and a journal for more."""
        answers = cls(journal=journal)
        answers.trials |= dict(journal.trials())
        for number in journal.numbers():
            answers.add(number)
        return answers

    def add(self, number: Number) -> None:
        """One answer, by what was asked."""
        if number.kind == "loss":
            (self.losses[number.key],) = number.values
        elif number.kind == "kl":
            self.divergences[number.key] = number.values
        else:
            self.changes[number.key] = number.values

    def __len__(self) -> int:
        return len(self.trials) + len(self.losses) + len(self.divergences) + len(self.changes)


def _timed(task: Callable[..., Result], worker: Worker, *args: object) -> tuple[Result, float]:
    return worker.timed(task, *args)


def _noted(journal: Journal, criterion: str, digest: bytes, result: object) -> None:
    """Keep one candidate's answer."""
    if isinstance(result, Trial):
        journal.keep(digest, result)
    elif isinstance(result, float):
        journal.note(Number("loss", digest, (result,)))
    else:
        assert isinstance(result, tuple), criterion
        journal.note(Number("kl", digest, result))


def _digest_of(plan: Plan, change: Counts, part: range) -> bytes:
    """Of a plan with a change, asked on a part of the search text."""
    sha = hashlib.sha256(plan.digest + repr(part).encode())
    for linear in sorted(change):
        sha.update(repr(linear).encode())
        sha.update(change[linear].numpy().tobytes())
    return sha.digest()


def _itself(score: float) -> float:
    return score


def _mean(divergences: Sequence[float]) -> float:
    return sum(divergences) / len(divergences)


def _changed(worker: Worker, numbers: Sequence[int], changes: Sequence[Counts], plan: Plan, part: range) -> list[float]:
    """Worker.changed of some of `changes`, which are the same for all workers."""
    return worker.changed([changes[number] for number in numbers], plan, part)


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
        criterion: str = "alignment",
        levels: int = 0,
        target: float = 0.0,
        answers: Answers | None = None,
        reference: Statistics | None = None,
    ) -> None:
        """`reference`: the statistics of the search text on the dense model, where they are known.

        `levels` > 0: a solver's candidates are put together from linears solved at some of so many levels.

        `answers` are those of an earlier search of the same workers, text and criterion; `spared_s` counts the seconds
        that they took then.
        """
        self.candidates: list[Candidate] = []
        self.evaluations = 0.0
        self.rounds = 0
        self.spared_s = 0.0
        self._mine: set[tuple[str, bytes]] = set()
        self._pool, self._layout, self._calibration, self._progress = pool, layout, calibration, progress
        self._text = calibration[:samples]
        self._authors, self._solves = mode == "authors", solves and not levels
        self._criterion, self._levels, self._target = criterion, levels, target
        self._answers = Answers() if answers is None else answers
        self._reference = reference

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        """One Trial per plan, in order."""
        divergence = self._criterion == "kl"
        if self._authors:
            run = partial(self._each, trial=Worker.local_trial)
        elif self._solves:
            run = partial(self._together, trials=partial(Worker.solved_trials, divergence=divergence))
        else:
            run = partial(self._grouped, task=partial(Worker.trials, divergence=divergence))
        score_of = partial(Trial.score, criterion=self._criterion)
        found = self._asked(step, self._criterion, lambdas, plans, self._answers.trials, run, score_of)
        self._answers.divergences |= {
            plan.digest: trial.divergences for plan, trial in zip(plans, found, strict=True) if trial.divergences
        }
        return found

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        """Mean KL divergence from the dense model of each search sequence under each plan, in nats a token."""
        run = partial(self._grouped, task=Worker.divergences)
        return self._asked(step, "kl", lambdas, plans, self._answers.divergences, run, _mean)

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        """Mean KL divergence over the search sequences in `part` of `plan` with each of `changes` made to it."""
        self.prepare()
        if part not in self._answers.excerpts:
            self._pool.each(partial(Worker.set_excerpt), part)  # a new function: those before are kept as well
            self._answers.excerpts.add(part)
        blocks, share = self._layout.num_blocks, len(part) / len(self._text)
        firsts = [min((linear.block for linear in change), default=blocks) for change in changes]
        keys = [_digest_of(plan, change, part) for change in changes]
        known, journal = self._answers.changes, self._answers.journal
        order = sorted(range(len(changes)), key=lambda number: firsts[number])
        order = [number for number in order if keys[number] not in known]
        size = -(-len(order) // (self._pool.replicas * self._pool.first(Worker.at_once))) or 1
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.evaluations += share * (sum(blocks - first for first in firsts) + max(firsts)) / blocks
        self.rounds += 1
        with self._progress.stage("probes", len(batches)) as advance:
            answers = map_side_by_side(self._pool, _changed, batches, changes, plan, part)
            for batch, values in zip(batches, answers, strict=True):
                for number, value in zip(batch, values, strict=True):
                    known[keys[number]] = (value,)
                    if journal is not None:
                        journal.note(Number("change", keys[number], (value,)))
                advance("")
        return [known[key][0] for key in keys]

    def differences(self, plan: Plan) -> dict[Linear, Float64[Tensor, " rows"]]:
        """The norm over the search text of each row's difference of outputs, dense and under `plan`."""
        self.prepare()
        samples, chunk = len(self._text), chunk_sequences(self._text.shape[1])
        parts = [range(start, min(start + chunk, samples)) for start in range(0, samples, chunk)]
        self.evaluations += 2
        self.rounds += 1
        sums: dict[Linear, Float64[Tensor, " rows"]] = {}
        for found in self._collected(
            "differences", len(parts), map_side_by_side(self._pool, Worker.differences, parts, plan)
        ):
            for linear, squares in found.items():
                sums[linear] = sums[linear] + squares if linear in sums else squares
        return {linear: squares.sqrt() for linear, squares in sums.items()}

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        """Mean cross-entropy of the search text under each plan, in order; nats per predicted token."""
        run = partial(self._grouped, task=Worker.losses)
        if self._solves:
            run = partial(self._together, trials=Worker.solved_losses)
        return self._asked(step, "loss", lambdas, plans, self._answers.losses, run, _itself)

    def measure(self, function: Callable[[Sequence[Weighed]], Result]) -> list[Result]:
        """`function` of the linears of every block, in order."""
        return self._collected(
            "measure", self._layout.num_blocks, self._pool.map(Worker.measure, range(self._layout.num_blocks), function)
        )

    def learn(self, function: Callable[[BlockTask], Result]) -> list[Result]:
        """`function` of every block with the search text that enters it, in order."""
        self.prepare()
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
        run: Callable[[Iterable[Plan]], Iterator[tuple[Result, float]]],
        score_of: Callable[[Result], float],
    ) -> list[Result]:
        """Run what is not known yet, note every candidate, and answer in order; a plan is looked at in its turn."""
        self.prepare(with_end=criterion == "kl")
        new: dict[bytes, float] = {}
        asked: list[bytes] = []
        seconds: dict[bytes, float] = {}
        noun = noun_of(step)
        with self._progress.stage(f"{step} search", len(lambdas)) as advance:

            def unknown() -> Iterator[Plan]:
                for lam, plan in zip(lambdas, plans, strict=True):
                    if plan.digest in known or plan.digest in new:
                        advance(f"{noun} {lam:g}: known")
                        continue
                    new[plan.digest] = lam
                    asked.append(plan.digest)
                    yield plan

            for number, (result, spent) in enumerate(run(unknown())):
                digest = asked[number]
                known[digest], seconds[digest] = result, spent
                if self._answers.journal is not None:
                    _noted(self._answers.journal, criterion, digest, result)
                self._answers.seconds[criterion, digest] = spent
                advance(f"{noun} {new[digest]:g}: {criterion} {score_of(result):.4g}")
        mine = {(criterion, plan.digest) for plan in plans} - self._mine
        self.spared_s += sum(self._answers.seconds.get(key, 0.0) for key in mine if key[1] not in new)
        self._mine |= mine
        self.evaluations += len(new)
        self.rounds += bool(new)
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

    def _each(
        self, plans: Iterable[Plan], *, trial: Callable[[Worker, Plan], Result]
    ) -> Iterator[tuple[Result, float]]:
        """One task per plan."""
        return map_side_by_side(self._pool, partial(_timed, trial), plans)

    def _grouped(
        self, plans: Iterable[Plan], *, task: Callable[[Worker, Sequence[Plan]], list[Result]]
    ) -> Iterator[tuple[Result, float]]:
        """One task per plan, or per worker where what a block costs is shared."""
        parts: Iterable[Sequence[Plan]] = ([plan] for plan in plans)
        if self._pool.first(Worker.goes_together):
            parts = self._shares(plans)
        for found, seconds in map_side_by_side(self._pool, partial(_timed, task), parts):
            yield from ((one, seconds / len(found)) for one in found)

    def _together(
        self, plans: Iterable[Plan], *, trials: Callable[[Worker, Sequence[Plan], Tokens], list[Result]]
    ) -> Iterator[tuple[Result, float]]:
        """One task per worker: its plans share the statistics and factorizations of each block."""
        parts = self._shares(plans)
        for found, seconds in self._pool.map(partial(_timed, trials), parts, self._calibration):
            yield from ((one, seconds / len(found)) for one in found)  # they ran side by side

    def _shares(self, plans: Iterable[Plan]) -> list[list[Plan]]:
        """All plans, as many for each replica."""
        whole = list(plans)
        share = -(-len(whole) // self._pool.replicas) or 1
        return [whole[start : start + share] for start in range(0, len(whole), share)]

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

    def prepare(self, *, with_end: bool = False) -> None:
        """Bring the search text, and solved levels, to the workers; questions do so themselves.

        Norms that are known already spare a dense pass where what the text ends in is not asked for.
        """
        answers = self._answers
        if answers.prepared and (answers.with_end or not with_end):
            return
        known = None if with_end else self._reference
        keep = partial(Worker.set_search_text, chunk=1 if self._authors else None, with_reference=not self._authors)
        self._pool.each(keep, self._text, known)
        answers.prepared, answers.with_end = True, known is None and not self._authors
        answers.excerpts.clear()  # a new text has none
        if self._levels:
            ranges, levels = self._ranges(), levels_around(self._target, self._levels)
            stores = self._pool.map(Worker.solve_levels, ranges, levels, self._calibration)
            store = LevelStore(self._levels)
            for solved in self._collected("levels", len(ranges), stores):
                store = store.merge(solved)
            self._pool.each(Worker.keep_levels, store)
