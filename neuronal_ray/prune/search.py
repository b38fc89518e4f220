"""A search over the pool: one task per candidate, block or range of blocks, and each distinct plan once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Concatenate, ParamSpec, TypeVar

from jaxtyping import Float64, Int64
from torch import Tensor

from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Layout, Linear, LinearData
from neuronal_ray.core.level_plan import levels_around
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import BlockTask, RankedLinear
from neuronal_ray.prune.results import Results, change_digest, mean
from neuronal_ray.report.schemas import Candidate
from neuronal_ray.workers.pools.protocol import Pool, map_in_parallel
from neuronal_ray.workers.replica import Statistics, chunk_sequences
from neuronal_ray.workers.shard import ChainTask, Timed
from neuronal_ray.workers.solved_levels import LevelStore
from neuronal_ray.workers.tasks import candidates, probes, solver_candidates
from neuronal_ray.workers.tasks.parallel import parallel_tasks
from neuronal_ray.workers.tasks.statistics import rank_on_walk

P = ParamSpec("P")
Result = TypeVar("Result", Trial, float, tuple[float, ...])
Value = TypeVar("Value")
_VARIED = {"block": "lambda", "row": "lambda", "slope": "slope"}
"""What the candidates of a step vary; those of other steps are named by their number, from 1."""

Tokens = Int64[Tensor, "sequences length"]


def noun_of(step: str) -> str:
    """Return what the candidates of a step vary, "candidate" where they have no more than a number."""
    return _VARIED.get(step, "candidate")


class Search:
    """Answers an allocation's queries (core/problem.py: Probe); equal plans share one trial."""

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
        results: Results | None = None,
        reference: Statistics | None = None,
    ) -> None:
        """Search on the first `samples` sequences of `calibration`.

        `levels` > 0: candidates of a solver are put together from linears solved at some of so many levels. `results`
        are those of an earlier search on the same workers, text and criterion; `spared_s` counts the seconds that they
        took then. `reference`: the dense model's statistics of the search text, where they are known.
        """
        self.candidates: list[Candidate] = []
        self.evaluations = 0.0
        self.rounds = 0
        self.spared_s = 0.0
        self._queried: set[tuple[str, bytes]] = set()
        self._pool, self._layout, self._calibration, self._progress = pool, layout, calibration, progress
        self._text = calibration[:samples]
        self._authors, self._solves = mode == "authors", solves and not levels
        self._criterion, self._levels, self._target = criterion, levels, target
        self._results = Results() if results is None else results
        self._reference = reference

    # -- scores of candidates

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        """Return one Trial per plan, in order."""
        divergence = self._criterion == "kl"
        if self._authors:
            run = self._local_trials
        elif self._solves:
            run = partial(self._run_solved, solver_candidates.solved_trials, divergence=divergence)
        else:
            run = partial(self._run, candidates.trials, divergence=divergence)
        score_of = partial(Trial.score, criterion=self._criterion)
        trials = self._query(step, self._criterion, lambdas, plans, self._results.trials, run, score_of)
        self._results.divergences |= {
            plan.digest: trial.divergences for plan, trial in zip(plans, trials, strict=True) if trial.divergences
        }
        return trials

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        """Return, per plan, the mean KL divergence of each search sequence from the dense model, nats a token."""
        run = partial(self._run, candidates.divergences)
        return self._query(step, "kl", lambdas, plans, self._results.divergences, run, mean)

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        """Return the mean cross-entropy of the search text under each plan, in order; nats per predicted token."""
        run = partial(self._run, candidates.losses)
        if self._solves:
            run = partial(self._run_solved, solver_candidates.solved_losses)
        return self._query(step, "loss", lambdas, plans, self._results.losses, run, float)

    def _query(
        self,
        step: str,
        criterion: str,
        lambdas: Sequence[float],
        plans: Sequence[Plan],
        known: dict[bytes, Result],
        run: Callable[[Iterable[Plan]], Iterator[tuple[Result, float]]],
        score_of: Callable[[Result], float],
    ) -> list[Result]:
        """Try the plans that are not known yet, record every candidate, and return the results in order.

        A plan is looked at when its turn comes: later plans may still be in the making.
        """
        self.prepare(with_dense_end=criterion == "kl")
        results = self._results
        new: dict[bytes, float] = {}
        order: list[bytes] = []
        seconds: dict[bytes, float] = {}
        noun = noun_of(step)
        with self._progress.stage(f"{step} search", len(lambdas)) as advance:

            def unknown() -> Iterator[Plan]:
                for lam, plan in zip(lambdas, plans, strict=True):
                    if plan.digest in known or plan.digest in new:
                        advance(f"{noun} {lam:g}: known")
                        continue
                    new[plan.digest] = lam
                    order.append(plan.digest)
                    yield plan

            for number, (result, spent) in enumerate(run(unknown())):
                digest = order[number]
                known[digest], seconds[digest] = result, spent
                results.record(digest, result)
                results.seconds[criterion, digest] = spent
                advance(f"{noun} {new[digest]:g}: {criterion} {score_of(result):.4g}")
        queried = {(criterion, plan.digest) for plan in plans} - self._queried
        self.spared_s += sum(results.seconds.get(key, 0.0) for key in queried if key[1] not in new)
        self._queried |= queried
        self.evaluations += len(new)
        self.rounds += bool(new)
        found = [known[plan.digest] for plan in plans]
        self.candidates += [
            Candidate(
                step=step, lam=lam, criterion=criterion, score=score_of(result), seconds=seconds.pop(plan.digest, 0.0)
            )
            for lam, plan, result in zip(lambdas, plans, found, strict=True)
        ]
        return found

    def _local_trials(self, plans: Iterable[Plan]) -> Iterator[tuple[Trial, float]]:
        """Run the released code's trial, one task per plan."""
        return map_in_parallel(self._pool, Timed(candidates.local_trial), plans)

    def _run(
        self,
        task: ChainTask[Concatenate[Sequence[Plan], P], Any, list[Value]],
        plans: Iterable[Plan],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Iterator[tuple[Value, float]]:
        """Run one task per plan, or one per replica where the candidates of a task share the cost of a block."""
        groups: Iterable[Sequence[Plan]] = ([plan] for plan in plans)
        if self._pool.first(candidates.pass_together):
            groups = self._shares(plans)
        for results, seconds in map_in_parallel(self._pool, Timed(task), groups, *args, **kwargs):
            yield from ((result, seconds / len(results)) for result in results)

    def _run_solved(
        self,
        task: ChainTask[Concatenate[Sequence[Plan], Tokens, P], Any, list[Value]],
        plans: Iterable[Plan],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Iterator[tuple[Value, float]]:
        """Run one task per replica: its plans share the statistics and factors of each block."""
        shares = self._shares(plans)
        for results, seconds in self._pool.map(Timed(task), shares, self._calibration, *args, **kwargs):
            yield from ((result, seconds / len(results)) for result in results)

    # -- other queries

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        """Return the mean KL divergence over the search sequences in `part` of `plan` with each of `changes` made."""
        self.prepare()
        results = self._results
        if part not in results.excerpts:
            self._pool.each_also(probes.set_excerpt, part)
            results.excerpts.add(part)
        blocks, share = self._layout.num_blocks, len(part) / len(self._text)
        firsts = [min((linear.block for linear in change), default=blocks) for change in changes]
        keys = [change_digest(plan, change, part) for change in changes]
        order = sorted(range(len(changes)), key=lambda number: firsts[number])
        order = [number for number in order if keys[number] not in results.changes]
        size = -(-len(order) // (self._pool.replicas * self._pool.first(parallel_tasks))) or 1
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        self.evaluations += share * (sum(blocks - first for first in firsts) + max(firsts)) / blocks
        self.rounds += 1
        with self._progress.stage("probes", len(batches)) as advance:
            divergences = map_in_parallel(self._pool, probes.changed, batches, changes, plan, part)
            for batch, values in zip(batches, divergences, strict=True):
                for number, value in zip(batch, values, strict=True):
                    results.record_change(keys[number], value)
                advance("")
        return [results.changes[key] for key in keys]

    def differences(self, plan: Plan) -> dict[Linear, Float64[Tensor, " rows"]]:
        """Return the norm over the search text of each row's difference of outputs, dense and under `plan`."""
        self.prepare()
        samples, chunk = len(self._text), chunk_sequences(self._text.shape[1])
        parts = [range(start, min(start + chunk, samples)) for start in range(0, samples, chunk)]
        self.evaluations += 2
        self.rounds += 1
        sums: dict[Linear, Float64[Tensor, " rows"]] = {}
        differences = map_in_parallel(self._pool, probes.differences, parts, plan)
        for squares_by_linear in self._collected("differences", len(parts), differences):
            for linear, squares in squares_by_linear.items():
                sums[linear] = sums[linear] + squares if linear in sums else squares
        return {linear: squares.sqrt() for linear, squares in sums.items()}

    def measure(self, function: Callable[[Sequence[LinearData]], Value]) -> list[Value]:
        """Return `function` of the linears of every block, in order."""
        blocks = range(self._layout.num_blocks)
        return self._collected("measure", len(blocks), self._pool.map(probes.measure, blocks, function))

    def map_linears(self, function: Callable[[RankedLinear], Value], plan: Plan) -> dict[Linear, Value]:
        """Return `function` of every linear, with its counts under `plan` and the Gram of its inputs."""
        ranges = self._ranges()
        mapped = self._pool.map(probes.map_linears, ranges, function, plan, self._calibration)
        return {
            linear: value for part in self._collected("rows", len(ranges), mapped) for linear, value in part.items()
        }

    def learn(self, function: Callable[[BlockTask], Value]) -> list[Value]:
        """Return `function` of every block with the search text that enters it, in order."""
        self.prepare()
        if self._solves:
            self._pool.each(rank_on_walk, self._calibration)
        ranges = self._ranges()
        learned = self._collected("learning", len(ranges), self._pool.map(probes.learn, ranges, function))
        return [result for results in learned for result in results]

    def criterion(self, step: str) -> str:
        """Return what the candidates of `step` were compared by."""
        return next(candidate.criterion for candidate in self.candidates if candidate.step == step)

    # -- what the workers hold, and how work is divided

    def prepare(self, *, with_dense_end: bool = False) -> None:
        """Bring the search text, and solved levels, to the workers; queries do so themselves.

        Norms that are known already spare a dense pass, unless the dense model's last hidden states are needed too.
        """
        results = self._results
        if results.prepared and (results.with_dense_end or not with_dense_end):
            return
        known = None if with_dense_end else self._reference
        chunk, with_reference = (1, False) if self._authors else (None, True)
        self._pool.each(candidates.set_search_text, self._text, known, chunk=chunk, with_reference=with_reference)
        results.prepared, results.with_dense_end = True, known is None and with_reference
        results.excerpts.clear()  # a new text has none
        if self._levels:
            ranges, levels = self._ranges(), levels_around(self._target, self._levels)
            stores = self._pool.map(solver_candidates.solve_levels, ranges, levels, self._calibration)
            store = LevelStore(self._levels)
            for solved in self._collected("levels", len(ranges), stores):
                store = store.merge(solved)
            self._pool.each(solver_candidates.keep_levels, store)

    def _shares(self, plans: Iterable[Plan]) -> list[list[Plan]]:
        """Return all plans in groups of equal size, one for each replica."""
        whole = list(plans)
        share = -(-len(whole) // self._pool.replicas) or 1
        return [whole[start : start + share] for start in range(0, len(whole), share)]

    def _collected(self, name: str, total: int, results: Iterator[Value]) -> list[Value]:
        collected = []
        with self._progress.stage(name, total) as advance:
            for result in results:
                collected.append(result)
                advance("")
        return collected

    def _ranges(self) -> list[range]:
        """Return contiguous ranges of blocks, one per replica: text passes a replica's earlier blocks once."""
        blocks, replicas = self._layout.num_blocks, min(self._pool.replicas, self._layout.num_blocks)
        bounds = [blocks * index // replicas for index in range(replicas + 1)]
        return [range(start, stop) for start, stop in pairwise(bounds)]
