"""The tasks of a worker: it gathers statistics, ranks or solves, tries plans and writes the result.

A sparse model is never stored: it is the ranking cut by a plan, or the solver's answer to it, put in place block by
block while text passes through. A worker holds a shard: all blocks of the model or a contiguous range of them. In a
chain of shards a task runs on one after the other; what a shard returns is handed to the next, the last one's is the
result.
"""

import copy
import hashlib
import math
import os
import platform
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from neuronal_ray.comparison import Comparison, merged
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec, Weighed
from neuronal_ray.core.masks import cut
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.stats import Gram, RunningGram, RunningNorm, SquareSum, Statistic
from neuronal_ray.core.trim import trim_rows
from neuronal_ray.cuts import Cuts
from neuronal_ray.lanes import Lane, Lanes, lane_count
from neuronal_ray.levels import LevelStore, solve_at_levels
from neuronal_ray.models.blocks import Recording, is_transposed
from neuronal_ray.models.parts import Part, copy_part, stored_tensors, write_weights, zero_masked
from neuronal_ray.models.wiring import Kinds
from neuronal_ray.recipe import Ranks, Recipe
from neuronal_ray.replica import BlockText, Replica, Statistics, Weights, chunk_sequences
from neuronal_ray.search_text import SearchText

Item = TypeVar("Item")
Result = TypeVar("Result")
State = TypeVar("State")

FEW_TOKENS = 32
"""An expert that fewer tokens were routed to is judged by the inputs of all experts of its kind in its block."""

_RELEASED: dict[type[Statistic], type[Statistic]] = {SquareSum: RunningNorm, Gram: RunningGram}
"""The released code's float32 forms of the statistics."""


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that a worker needs to build its state, wherever it runs."""

    model_path: Path
    device: str
    dtype: str
    recipe: Recipe
    threads: int | None
    trust_remote_code: bool
    profile: bool = False
    shard: int = 0
    shards: int = 1
    streams: bool = False


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How calibration text passes through the blocks for the final scores.

    `pruned`: each block sees the output of its pruned predecessors, else of the dense ones. `released`: one sequence
    at a time into the released code's statistics.
    """

    pruned: bool
    released: bool = False

    def kinds(self, wanted: Sequence[type[Statistic]]) -> tuple[type[Statistic], ...]:
        """`wanted` in the form that this walk gathers."""
        return tuple(_RELEASED.get(kind, kind) if self.released else kind for kind in wanted)


_SolvedStep = tuple[int, list[Recording], list[list[Recording]], list[list[dict[Group, Statistic]]]]


@dataclass(frozen=True)
class Handed(Generic[State]):
    """What a shard hands to the next: the hidden states of each chunk of its streams, and what was found so far.

    `seconds` that a task took so far, where that is asked for.
    """

    streams: Sequence[Sequence[Float[Tensor, "sequences tokens features"]]]
    found: State
    seconds: float = 0.0


class Worker:
    """See the module's docstring. Methods are called in the order: observe, rank, set_search_text, trial, finish."""

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        self.spec, self.recipe = spec, spec.recipe
        self.replica = Replica(
            spec.model_path,
            device=spec.device,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
            synchronize=spec.profile,
            shard=spec.shard,
            shards=spec.shards,
            streams=spec.streams,
        )
        self._host = torch.device("cpu") if spec.streams else self.replica.device  # where rankings are kept
        self.device, self.stopwatch = self.replica.device, self.replica.stopwatch
        self.blocks = self.replica.blocks
        self._handed: object = None
        self._upstream: Callable[..., object] | None = None
        self._statistics: Statistics | None = None
        self._ranks: dict[Linear, Ranks] = {}
        self._final: dict[Linear, Ranks] = {}
        self._solved: dict[Linear, Tensor] = {}
        self._search: SearchText | None = None
        self._excerpts: dict[range, SearchText] = {}
        self._levels: LevelStore | None = None
        self._dense: Statistics = {}
        self._cuts = Cuts(self.replica)
        self._lanes: Lanes | None = None
        self._sharing = 1  # tasks under way at the same time, this worker's included

    # -- shards ------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The layout of the whole model; in a chain, once it was kept."""
        return self.replica.layout

    def relay(self, handed: object, task: Callable[..., Result], *args: object) -> Result:
        """`task(self, *args)` given what the shard before returned; None at the first shard of a chain."""
        before, self._handed = self._handed, handed
        try:
            return task(self, *args)
        finally:
            self._handed = before

    def set_upstream(self, upstream: Callable[..., object]) -> None:
        """How the last shard asks those before it: `upstream(task, *args)` is what they would hand to it."""
        self._upstream = upstream

    def _take(self, streams: list[list[Recording]], found: State) -> tuple[list[list[Recording]], State]:
        """Streams of text as they enter this shard, and what was found so far: at the first shard what is given.

        Further down `streams` say with which arguments the blocks are called.
        """
        if self._handed is None:
            return list(streams), found
        handed = cast(Handed[State], self._handed)
        entering = [
            [Recording(hidden.to(self.device), own.calls) for hidden, own in zip(chunks, recordings, strict=True)]
            for chunks, recordings in zip(handed.streams, streams, strict=True)
        ]
        return list(entering), handed.found

    def _give(self, streams: list[list[Recording]], found: object, end: Callable[[], Result]) -> Result:
        """What this shard returns: the task's result if it is the last, else what it hands on in its place."""
        if self.is_last:
            return end()
        hidden = [[recording.hidden for recording in recordings] for recordings in streams]
        return cast(Result, Handed(hidden, found))

    def timed(self, task: Callable[..., Result], *args: object) -> tuple[Result, float]:
        """What `task(worker, *args)` returns, and the seconds that it took in all shards: its share of those of tasks
        that go beside it.
        """
        before = self._handed.seconds if isinstance(self._handed, Handed) else 0.0
        begin = perf_counter()
        found = task(self, *args)
        seconds = before + (perf_counter() - begin) / self._sharing
        if isinstance(found, Handed):
            return cast(tuple[Result, float], replace(found, seconds=seconds))
        return found, seconds

    # -- side by side ------------------------------------------------------------------------------------------

    def at_once(self) -> int:
        """How many tasks that ask for no more than a pass this worker takes side by side (see lanes.py).

        A solver wants all threads for its large products.
        """
        if self.device.type != "cpu" or self.spec.streams or self.spec.shards > 1 or self.recipe.solves:
            return 1
        blocks = self.layout.blocks
        weights = max(sum(self.replica.weight(spec).nbytes for spec in block) for block in blocks)
        return lane_count(torch.get_num_threads(), weights)

    def side_by_side(self, items: Sequence[Item], task: Callable[..., Result], *shared: object) -> list[Result]:
        """`task(worker, item, *shared)` for each item; the tasks change nothing that the worker holds.

        One alone has no more threads than one of several: sums may depend on their number.
        """
        count = self.at_once()
        if count == 1:
            return [task(self, item, *shared) for item in items]
        if self._lanes is None:
            self._lanes = Lanes(self.replica, count)
        return self._lanes.map(lambda lane, item: task(self._in(lane), item, *shared), items)

    def _in(self, lane: Lane) -> "Worker":
        """This worker with the replica of a lane."""
        one = copy.copy(self)
        one.replica, one.stopwatch, one._cuts = lane.replica, lane.replica.stopwatch, lane.cuts
        one._sharing = lane.beside
        return one

    @property
    def is_last(self) -> bool:
        """Whether the last block is here, and with it the results of tasks."""
        return self.blocks.stop == self.replica.num_blocks

    def trace(self) -> Layout | Kinds:
        """The layout, which the shards of a chain find together; each is handed the kinds of blocks before it."""
        known = self.replica.trace(cast(Kinds, self._handed or Kinds()))
        return self.layout if self.is_last else known

    def keep_layout(self, layout: Layout) -> None:
        """The layout that the last shard found."""
        self.replica.keep_layout(layout)

    def describe(self) -> Layout:
        """The layout of the model."""
        return self.layout

    def use(self, recipe: Recipe) -> None:
        """Choose weights by `recipe` from now on; rankings and what was made of them are dropped."""
        self.recipe, self._ranks, self._levels = recipe, {}, None
        self.unfinish()

    def unfinish(self) -> None:
        """The final masks are cuts of the ranking again."""
        self._final, self._solved = {}, {}

    def peak_memory(self) -> int:
        """Bytes: the most that was allocated on a GPU, or that this process was resident in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB

    def device_name(self) -> str:
        """The name of the device, for the report."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu, {torch.get_num_threads()} threads"

    def chunk_sequences(self, length: int) -> int:
        """Number of sequences of `length` tokens that pass through a block at once here."""
        return chunk_sequences(length, self.device.type)

    def fingerprint(self) -> str:
        """Equal for equal checkpoints and dtypes, as far as can be told without reading the weights."""
        checkpoint = self.replica.checkpoint
        sha = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
        for name, stored in sorted(checkpoint.tensors.items()):
            place = (name, stored.start, stored.stop, stored.dtype, stored.path.name, stored.path.stat().st_mtime_ns)
            sha.update(repr(place).encode())
        return f"{sha.hexdigest()} {self.replica.stream.model.dtype}"

    # -- the dense stream: one pass, one ranking ------------------------------------------------------------

    def observe(self, tokens: Int64[Tensor, "sequences length"], kind: type[Statistic] = SquareSum) -> Statistics:
        """Statistics of one chunk of calibration text on the dense model, on the host; of a worker that is no shard."""
        (statistics,) = self.observe_all(tokens, (kind,))
        return statistics

    def observe_all(
        self, tokens: Int64[Tensor, "sequences length"], kinds: tuple[type[Statistic], ...]
    ) -> list[dict[Group, Statistic]]:
        """`observe` for several kinds of statistics in one pass."""
        _, recordings = self.replica.start(tokens)
        (recordings,), found = self._take([recordings], [dict[Group, Statistic]() for _ in kinds])
        host = torch.device("cpu")
        recordings, statistics = self._dense_statistics(recordings, kinds)
        for known, seen in zip(found, statistics, strict=True):
            known |= {group: statistic.to(host) for group, statistic in seen.items()}
        return self._give([recordings], found, lambda: found)

    def keep_statistics(self, statistics: Statistics) -> None:
        """Remember the statistics of the whole calibration text on the dense stream."""
        self._statistics = self._here(statistics)

    def rank(self) -> None:
        """Rank the rows of every linear once, by the method's score on the dense stream's statistics."""
        for index in self.replica.visited(self.blocks):
            self._ranks |= self._rank_block(index, self._statistics)

    def rank_on_walk(self, tokens: Int64[Tensor, "sequences length"]) -> None:
        """`rank` for statistics that are held for one block at a time."""
        assert self.recipe.statistic is not None
        (recordings,), _ = self._take([self.replica.start(tokens)[1]], None)
        for index, recordings, (observed,) in self._dense_walk(recordings, (self.recipe.statistic,)):  # noqa: B007, B020
            self._ranks |= self._rank_block(index, observed)
        return self._give([recordings], None, lambda: None)

    def set_search_text(
        self,
        tokens: Int64[Tensor, "sequences length"],
        reference: Statistics | None = None,
        *,
        chunk: int | None,
        with_reference: bool,
    ) -> None:
        """Keep the search sequences' embeddings and, if asked, what the dense model makes of them: the activation
        norms (A_D) and, in the last shard, the last hidden states; drops the levels.

        `reference`: the norms are known already and all that is wanted.
        """
        self._search, self._excerpts = SearchText(self.replica, tokens, chunk=chunk), {}
        self._levels = None
        self._dense = {}
        if reference is not None:
            self._dense = self._here(reference)
            return None
        (recordings,), _ = self._take([self._search.recordings], None)
        if with_reference:
            recordings, (self._dense,) = self._dense_statistics(recordings, (SquareSum,))
            self._search.keep_dense_end(recordings if self.is_last else ())
        return self._give([recordings], None, lambda: None)

    def set_excerpt(self, sequences: range) -> None:
        """Keep some of the search sequences as a text of their own, for `changed`."""
        excerpt = SearchText(self.replica, self._text.tokens[sequences.start : sequences.stop])
        (recordings,), _ = self._take([excerpt.recordings], None)
        recordings, _ = self._dense_statistics(recordings, ())
        excerpt.keep_dense_end(recordings if self.is_last else ())
        self._excerpts[sequences] = excerpt
        return self._give([recordings], None, lambda: None)

    @property
    def _text(self) -> SearchText:
        assert self._search is not None, "set_search_text comes first"
        return self._search

    def trial(self, plan: Plan, *, divergence: bool = False) -> Trial:
        """Alignment of the model under `plan` with the dense model's own stream (Algorithm 1).

        With `divergence` also how far its next-token distributions are from the dense model's.
        """
        (found,) = self.trials([plan], divergence=divergence)
        return found

    def trials(self, plans: Sequence[Plan], *, divergence: bool = False) -> list[Trial]:
        """`trial` of several plans, which pass each block together: a block that visits the device comes once."""
        streams, comparisons = self._take([self._text.recordings] * len(plans), [Comparison() for _ in plans])
        for index in self.replica.visited(self.blocks):
            last = index == self.layout.num_blocks - 1 and not divergence
            with self.replica.without_output(index) if last else nullcontext():
                ranks = self._ranks_near(index)
                for number, (plan, comparison) in enumerate(zip(plans, comparisons, strict=True)):
                    weights = self._weights(index, plan, ranks)
                    streams[number], (observed,) = self.replica.run_with(index, streams[number], weights, (SquareSum,))
                    comparison.add(self.layout, index, self._dense, observed)
        return self._give(
            streams,
            comparisons,
            lambda: [
                comparison.trial(self._text.divergence(recordings, self.replica) if divergence else ())
                for comparison, recordings in zip(comparisons, streams, strict=True)
            ],
        )

    def goes_together(self) -> bool:
        """Whether candidates should come in groups: what each block costs is shared by those that pass it together."""
        return self.spec.streams

    def loss(self, plan: Plan) -> float:
        """Mean cross-entropy of the search text under `plan`, in nats per predicted token."""
        (recordings,), _ = self._take([self._text.recordings], None)
        recordings = self._pass(recordings, plan)
        return self._give([recordings], None, lambda: self._loss(recordings))

    def divergence(self, plan: Plan) -> tuple[float, ...]:
        """Mean KL divergence of each search sequence's next-token distributions, dense from sparse; nats a token."""
        (recordings,), _ = self._take([self._text.recordings], None)
        recordings = self._pass(recordings, plan)
        return self._give([recordings], None, lambda: self._text.divergence(recordings, self.replica))

    def changed(self, changes: Sequence[Counts], plan: Plan, sequences: range) -> list[float]:
        """Mean divergence over an excerpt (see set_excerpt) of `plan` with each of `changes` made to it, in order.

        Text passes through the blocks before a change once for all changes.
        """
        text, num_blocks = self._excerpts[sequences], self.layout.num_blocks
        firsts = [min((linear.block for linear in change), default=num_blocks) for change in changes]
        plans = [replace(plan, removed={**plan.removed, **change}) for change in changes]
        begun = [number for number, first in enumerate(firsts) if first < self.blocks.start]
        entering, found = self._take([text.recordings] * (1 + len(begun)), dict[int, float]())
        streams = dict(zip(begun, entering[1:], strict=True))  # those that earlier shards have changed
        recordings = entering[0]

        def passed(number: int, recordings: list[Recording], *, first: int) -> None:
            """One changed stream through the rest of this shard."""
            streams[number] = self._pass(recordings, plans[number], first=first)
            if self.is_last:
                divergences = text.divergence(streams.pop(number), self.replica)
                found[number] = sum(divergences) / len(divergences)

        for number in begun:
            passed(number, streams[number], first=self.blocks.start)
        for index in self.replica.visited(self.blocks):
            for number, first in enumerate(firsts):
                if first == index:
                    passed(number, recordings, first=index)
            if index < max(firsts):
                recordings, _ = self.replica.run_with(index, recordings, self._weights(index, plan))
        if self.is_last:
            for number in (number for number, first in enumerate(firsts) if first == num_blocks):
                passed(number, recordings, first=num_blocks)
        leaving = [streams[number] for number in sorted(streams)]
        return self._give([recordings, *leaving], found, lambda: [found[number] for number in range(len(changes))])

    def differences(self, sequences: range, plan: Plan) -> dict[Linear, Float64[Tensor, " rows"]]:
        """Over some search sequences, each row's sum of squared differences of its output, dense and under `plan`.

        Both models run side by side, each on its own stream. Experts are left out: other tokens may reach them.
        """
        _, recordings = self.replica.start(self._text.tokens[sequences.start : sequences.stop])
        (dense, sparse), found = self._take([recordings, recordings], dict[Linear, Float64[Tensor, " rows"]]())
        for index in self.replica.visited(self.blocks):
            specs = [spec for spec in self.layout.blocks[index] if spec.expert is None]
            with self.replica.outputs(specs) as ours:
                dense, _ = self.replica.run(index, dense)
            with self.replica.outputs(specs) as theirs:
                sparse, _ = self.replica.run_with(index, sparse, self._weights(index, plan))
            for spec in specs:
                pairs = zip(ours[spec.linear], theirs[spec.linear], strict=True)
                sums = [(one.float() - other.float()).square().flatten(0, -2).sum(dim=0) for one, other in pairs]
                found[spec.linear] = torch.stack(sums).sum(dim=0).double().cpu()
        return self._give([dense, sparse], found, lambda: found)

    def measure(self, block: int, function: Callable[[Sequence[Weighed]], Result]) -> Result:
        """`function` of the dense linears of one block and their inputs' statistics."""
        if block not in self.blocks:
            return cast(Result, self._handed)
        with self.replica.stream.resident(block):
            return function(
                [
                    Weighed(spec=spec, weight=self.replica.weight(spec), inputs=self._inputs(spec, self._statistics))
                    for spec in self.layout.blocks[block]
                ]
            )

    def learn(self, blocks: range, function: Callable[[BlockText], Result]) -> list[Result]:
        """`function` of each block of the range, with the search text as it enters it in the dense model."""
        (recordings,), results = self._take([self._text.recordings], list[Result]())
        for index in self.replica.visited(self._until(blocks.stop)):
            outputs, _ = self.replica.run(index, recordings)
            if index in blocks:
                block = BlockText(self.replica, index, recordings, outputs, self._ranks_near(index))
                results.append(function(block))
            recordings = outputs
        return self._give([recordings], results, lambda: results)

    def trim(
        self, blocks: range, plan: Plan, tokens: Int64[Tensor, "sequences length"]
    ) -> dict[Linear, Float64[Tensor, " rows"]]:
        """TRIM's row rates of the linears of a range of blocks, on the dense stream (Differs: not the pruned one)."""
        (recordings,), rates = self._take([self.replica.start(tokens)[1]], dict[Linear, Float64[Tensor, " rows"]]())
        for index, recordings, statistics in self._dense_walk(recordings, (Gram,), wanted=blocks):  # noqa: B007, B020
            for spec in self.layout.blocks[index] if statistics else ():
                gram = self._inputs(spec, statistics[0])
                assert isinstance(gram, Gram)
                with self.stopwatch.measure("rows"):
                    found = trim_rows(
                        self.replica.weight(spec),
                        gram.total,
                        self._near(self._ranks[spec.linear]),
                        plan.removed[spec.linear],
                    )
                rates[spec.linear] = found.cpu()
        return self._give([recordings], rates, lambda: rates)

    # -- solvers: candidates side by side, one factorization for all --------------------------------------------

    def solved_trials(
        self, plans: Sequence[Plan], tokens: Int64[Tensor, "sequences length"], *, divergence: bool = False
    ) -> list[Trial]:
        """`trial` for a method that solves: statistics of `tokens` on the dense stream, shared by all plans."""
        (dense, *streams), comparisons = self._take(self._beside(plans, tokens), [Comparison() for _ in plans])
        for index, dense, streams, observed in self._solved_walk(dense, streams, plans, (SquareSum,)):  # noqa: B007, B020
            for comparison, (sparse,) in zip(comparisons, observed, strict=True):
                comparison.add(self.layout, index, self._dense, sparse)
        return self._give(
            [dense, *streams],
            comparisons,
            lambda: [
                comparison.trial(self._text.divergence(stream, self.replica) if divergence else ())
                for comparison, stream in zip(comparisons, streams, strict=True)
            ],
        )

    def solved_losses(self, plans: Sequence[Plan], tokens: Int64[Tensor, "sequences length"]) -> list[float]:
        """`loss` for a method that solves."""
        (dense, *streams), _ = self._take(self._beside(plans, tokens), None)
        for _, dense, streams, _ in self._solved_walk(dense, streams, plans, ()):  # noqa: B007, B020
            pass
        return self._give([dense, *streams], None, lambda: [self._loss(recordings) for recordings in streams])

    def _beside(self, plans: Sequence[Plan], tokens: Int64[Tensor, "sequences length"]) -> list[list[Recording]]:
        """The calibration text, and the search text once for every plan."""
        return [self.replica.start(tokens)[1], *(self._text.recordings for _ in plans)]

    def _solved_walk(
        self,
        dense: list[Recording],
        streams: list[list[Recording]],
        plans: Sequence[Plan],
        kinds: tuple[type[Statistic], ...],
    ) -> Iterator[_SolvedStep]:
        """After each block its index, the calibration text, the search text under every plan and what was observed."""
        assert self.recipe.statistic is not None
        for index, dense, (grams,) in self._dense_walk(dense, (self.recipe.statistic,)):  # noqa: B020
            factors = self._factorized(index, grams)
            passed = []
            for plan, recordings in zip(plans, streams, strict=True):
                weights = self._solve(index, factors, plan)
                passed.append(self.replica.run_with(index, recordings, weights, kinds))
            streams = [recordings for recordings, _ in passed]
            yield index, dense, streams, [observed for _, observed in passed]

    def solve_levels(
        self, blocks: range, levels: Sequence[int], tokens: Int64[Tensor, "sequences length"]
    ) -> LevelStore:
        """The linears of a range of blocks solved at each of `levels` on the dense stream; on the host."""
        assert self.recipe.statistic is not None
        (recordings,), store = self._take([self.replica.start(tokens)[1]], LevelStore(self.recipe.levels))
        solved = {}
        walk = self._dense_walk(recordings, (self.recipe.statistic,), wanted=blocks)
        for index, recordings, statistics in walk:  # noqa: B007
            if not statistics:
                continue
            factors = self._factorized(index, statistics[0])
            with self.stopwatch.measure("solving"):
                for spec in self.layout.blocks[index]:
                    weight, factor = self.replica.weight(spec), factors[spec.reads]
                    solved[spec.linear] = solve_at_levels(spec, weight, factor, self.recipe, levels)
        store = store.merge(LevelStore(self.recipe.levels, solved).to(torch.device("cpu")))
        return self._give([recordings], store, lambda: store)

    def keep_levels(self, store: LevelStore) -> None:
        """Candidates are put together from these solutions from now on."""
        self._levels = store.of(self.blocks).to(self._host)

    # -- the pruned stream: the released code's order, each block after its pruned predecessors ---------------

    def local_trial(self, plan: Plan) -> Trial:
        """Alignment block by block against dense weights on the sparse stream, ranking anew (released code)."""
        kind = RunningGram if self.recipe.solves else RunningNorm
        (recordings,), comparison = self._take([self._text.recordings], Comparison(dead_is_infinite=True))
        for index in self.replica.visited(self.blocks):
            with self.stopwatch.measure("dense pass"):
                _, (reference,) = self.replica.run(index, recordings, (kind,))
            weights, _ = self._pruned_block(index, plan, [reference])
            recordings, (observed,) = self.replica.run_with(index, recordings, weights, (kind,))
            comparison.add(self.layout, index, reference, observed)
        return self._give([recordings], comparison, comparison.trial)

    def finish(self, plan: Plan, tokens: Int64[Tensor, "sequences length"], walk: Walk) -> None:
        """Settle the masks, or weights, that the model has under `plan` in the end.

        A ranking on the dense stream is settled already; else `tokens` pass through, block after block.
        """
        recipe = self.recipe
        self._final, self._solved = dict(self._ranks), {}
        if not walk.pruned and not recipe.walks:
            if recipe.refinement is not None:
                for index in self.replica.visited(self.blocks):
                    self._final |= self._refined(index, plan, self._final, self._statistics, self._statistics)
            return None
        (recordings,), _ = self._take([self.replica.start(tokens, chunk=1 if walk.released else None)[1]], None)
        kinds = walk.kinds(recipe.final_statistics)
        for index in self.replica.visited(self.blocks):
            with self.stopwatch.measure("dense pass"):
                outputs, observed = self.replica.run(index, recordings, kinds)
            for statistics in observed:
                _check_finite(statistics)
            weights, ranks = self._pruned_block(index, plan, observed)
            self._final |= ranks
            if recipe.solves:
                self._solved |= {linear: weight.to(self._host) for linear, weight in weights.items()}
            if walk.pruned:
                outputs, _ = self.replica.run_with(index, recordings, weights)
            recordings = outputs
        return self._give([recordings], None, lambda: None)

    def _pruned_block(
        self, index: int, plan: Plan, observed: Sequence[Statistics]
    ) -> tuple[Weights, Mapping[Linear, Ranks]]:
        """The weights of block `index` under `plan`, judged by what was just observed (method, refinement), and the
        rankings that they are cuts of; none where they were solved for.
        """
        if self.recipe.solves:
            return self._solve(index, self._factorized(index, observed[0]), plan), {}
        statistics = observed[0] if observed else None
        ranks = self._rank_block(index, statistics, lower_ties_first=plan.lower_ties_first)
        if self.recipe.refinement is not None:
            ranks = self._refined(index, plan, ranks, statistics, observed[-1])
        return self._cut(index, plan, ranks), ranks

    def _refined(
        self,
        index: int,
        plan: Plan,
        ranks: Mapping[Linear, Ranks],
        statistics: Statistics | None,
        moments: Statistics | None,
    ) -> dict[Linear, Ranks]:
        """Rankings of block `index` whose cuts under `plan` are the refined masks."""
        found = {}
        with self.stopwatch.measure("refinement"):
            for spec in self.layout.blocks[index]:
                seen = self._inputs(spec, moments)
                assert seen is not None
                refined = self.recipe.refined(
                    spec,
                    self.replica.weight(spec),
                    self._near(ranks[spec.linear]),
                    plan.removed[spec.linear],
                    self._inputs(spec, statistics),
                    seen,
                )
                found[spec.linear] = refined.to(self._host)
        return found

    # -- the result --------------------------------------------------------------------------------------------

    def logits(
        self,
        tokens: Int64[Tensor, "sequences length"],
        plan: Plan | None,
        read: Callable[[Iterator[Float[Tensor, "sequences length vocabulary"]]], Result],
    ) -> Result:
        """What `read` makes of the logits, chunk by chunk, of the model as `finish` left it under `plan`.

        None is the dense model.
        """
        parts, recordings = self.replica.start(tokens)
        (recordings,), _ = self._take([recordings], None)
        for index in self.replica.visited(self.blocks):
            if plan is None:
                recordings, _ = self.replica.run(index, recordings)
            else:
                recordings, _ = self.replica.run_with(index, recordings, self._finished(index, plan))
        return self._give([recordings], None, lambda: read(self.replica.finish(parts, recordings)))

    def answered(
        self, tokens: Int64[Tensor, "sequences length"], plan: Plan | None
    ) -> Float[Tensor, "sequences length vocabulary"]:
        """The logits of a text that comes up within a task of the last shard, such as a batch of a benchmark."""
        handed = None if self._upstream is None else self._upstream(Worker.logits, tokens.cpu(), plan, _joined)
        logits: Tensor = self.relay(handed, Worker.logits, tokens, plan, _joined)
        return logits

    def _finished(self, index: int, plan: Plan, *, lasting: bool = False) -> Weights:
        if self._solved:
            return {spec.linear: self._near(self._solved[spec.linear]) for spec in self.layout.blocks[index]}
        return self._cut(index, plan, self._final or self._ranks, lasting=lasting)

    @contextmanager
    def under(self, plan: Plan | None) -> Iterator[None]:
        """The whole model with the weights that `logits` gives it; one more copy of its linears while it lasts."""
        with ExitStack() as stack:
            if plan is not None:
                for index in self.replica.visited(self.blocks):
                    stack.enter_context(self.replica.swapped(self._finished(index, plan, lasting=True)))
            yield

    def mask(self, linear: Linear, plan: Plan) -> Bool[Tensor, "rows columns"]:
        """The final mask of one linear under `plan`, True where weights go."""
        if self._solved:
            return self._solved[linear] == 0
        return cut((self._final or self._ranks)[linear], plan.removed[linear])

    def sees(self, folder: Path) -> None:
        """Raise ValueError when the output directory cannot be written from here."""
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"--output: the worker on {platform.node()} cannot write to {folder.parent}; name a directory on "
                "storage that all nodes share"
            )

    def write(self, part: Part, plan: Plan, target: Path) -> int:
        """Write one file of the final model under `plan` into `target`; the zeros among its linears' weights."""
        if part.blocks.start not in self.blocks:
            return cast(int, self._handed)
        assert part.blocks.stop <= self.blocks.stop, "a part lies within a shard"
        written = copy_part(self.replica.checkpoint, part, target)
        put = write_weights if self._solved else zero_masked
        zeros = 0
        for block in part.blocks:
            values = {}
            for spec in self.layout.blocks[block]:
                value = self._solved[spec.linear] if self._solved else self.mask(spec.linear, plan)
                values[self.replica.name(spec)] = value.t() if is_transposed(self.replica.module(spec)) else value
            zeros += sum(put(written, stored_tensors(self.replica.stream.model, values)).values())
        return zeros

    def _near(self, tensor: Tensor) -> Tensor:
        """On the device."""
        return tensor.to(self.device)

    def _here(self, statistics: Statistics) -> Statistics:
        """Those of this shard's blocks, on the device."""
        return {
            group: statistic.to(self.device) for group, statistic in statistics.items() if group.block in self.blocks
        }

    # -- one block -----------------------------------------------------------------------------------------------

    def _until(self, stop: int) -> range:
        """The blocks of this shard before block `stop`."""
        return range(self.blocks.start, max(self.blocks.start, min(self.blocks.stop, stop)))

    def _dense_walk(
        self,
        recordings: list[Recording],
        kinds: tuple[type[Statistic], ...],
        *,
        wanted: range | None = None,
    ) -> Iterator[tuple[int, list[Recording], list[dict[Group, Statistic]]]]:
        """Block after block of the dense model: its index, the text after it and the statistics of its inputs.

        Of a range `wanted`: blocks up to its end, statistics of its own only.
        """
        for index in self.replica.visited(self.blocks if wanted is None else self._until(wanted.stop)):
            seen = kinds if wanted is None or index in wanted else ()
            with self.stopwatch.measure("dense pass"):
                recordings, observed = self.replica.run(index, recordings, seen)
            for statistics in observed:
                _check_finite(statistics)
            yield index, recordings, observed

    def _dense_statistics(
        self, recordings: list[Recording], kinds: tuple[type[Statistic], ...]
    ) -> tuple[list[Recording], list[dict[Group, Statistic]]]:
        """The text after this shard, and what was seen in its blocks."""
        found: list[dict[Group, Statistic]] = [{} for _ in kinds]
        with self.stopwatch.measure("dense pass"):
            for index in self.replica.visited(self.blocks):
                recordings, observed = self.replica.run(index, recordings, kinds)
                for known, seen in zip(found, observed, strict=True):
                    known |= seen
        for known in found:
            _check_finite(known)
        return recordings, found

    def _pass(self, recordings: list[Recording], plan: Plan, *, first: int | None = None) -> list[Recording]:
        """Search text that enters block `first`, after the last block of this shard under `plan`."""
        for index in self.replica.visited(range(self.blocks.start if first is None else first, self.blocks.stop)):
            recordings, _ = self.replica.run_with(index, recordings, self._weights(index, plan))
        return recordings

    def _weights(self, index: int, plan: Plan, ranks: Mapping[Linear, Ranks] | None = None) -> Weights:
        """A candidate's weights of block `index`, until the next one's: the ranking cut, or what was solved at the
        levels of `plan`. `ranks` are the block's on the device, if they are there already.
        """
        if self._levels is None:
            return self._cut(index, plan, self._ranks if ranks is None else ranks)
        with self.stopwatch.measure("masks"):
            found = self._levels.weights(self.layout.blocks[index], plan, self.replica.weight)
            return {linear: self._near(weight) for linear, weight in found.items()}

    def _ranks_near(self, index: int) -> dict[Linear, Ranks]:
        """The ranking of block `index` on the device."""
        linears = (spec.linear for spec in self.layout.blocks[index])
        return {linear: self._near(self._ranks[linear]) for linear in linears if linear in self._ranks}

    def _cut(self, index: int, plan: Plan, ranks: Mapping[Linear, Ranks], *, lasting: bool = False) -> Weights:
        """See Cuts.weights."""
        with self.stopwatch.measure("masks"):
            return self._cuts.weights(index, plan, ranks, lasting=lasting)

    def _rank_block(
        self, index: int, statistics: Statistics | None, *, lower_ties_first: bool = True
    ) -> dict[Linear, Ranks]:
        ranks = {}
        with self.stopwatch.measure("ranking"):
            for spec in self.layout.blocks[index]:
                with self._naming(spec.linear):
                    found = self.recipe.ranked(
                        self.replica.weight(spec), self._inputs(spec, statistics), lower_ties_first=lower_ties_first
                    )
                    ranks[spec.linear] = found.to(self._host)
        return ranks

    @contextmanager
    def _naming(self, linear: Linear) -> Iterator[None]:
        """A method's ValueError with the method and the linear in front."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"--method {self.recipe.method}: {linear}: {error}") from error

    def _factorized(self, index: int, grams: Statistics) -> dict[Group, object]:
        """The solver's factor of each group of block `index`."""
        factors = {}
        with self.stopwatch.measure("factorization"):
            for group, first in self.layout.first_readers(index).items():
                inputs = self._inputs(first, grams)
                assert inputs is not None
                with self._naming(first.linear):
                    factors[group] = self.recipe.factorized(inputs)
        return factors

    def _solve(self, index: int, factors: Mapping[Group, object], plan: Plan) -> Weights:
        with self.stopwatch.measure("solving"):
            return {
                spec.linear: self.recipe.solved(spec, self.replica.weight(spec), factors[spec.reads], plan)
                for spec in self.layout.blocks[index]
            }

    def _inputs(self, spec: LinearSpec, statistics: Statistics | None) -> Statistic | None:
        """What was seen of a linear's inputs; an expert that saw few tokens has the sum over its like."""
        if statistics is None:
            return None
        own = statistics.get(spec.reads)
        if spec.expert is None:
            assert own is not None, spec.linear
            return own
        if own is not None and own.tokens >= FEW_TOKENS:
            return own
        return merged(statistics, self.layout.routed[spec.reads])

    def _loss(self, recordings: list[Recording]) -> float:
        """Mean cross-entropy per predicted token of the search text, infinite on overflow."""
        total, count = 0.0, 0
        texts = (row for tokens in self._text.parts for row in tokens)
        rows = (row for logits in self.replica.finish(self._text.parts, recordings) for row in logits)
        for row, wanted in zip(rows, texts, strict=True):
            total += float(F.cross_entropy(row[:-1].float(), wanted[1:], reduction="sum"))
            count += len(wanted) - 1
        return total / count if math.isfinite(total) else math.inf


def _joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks))


def _check_finite(statistics: Mapping[Group, Statistic]) -> None:
    """Raise ValueError naming the first block whose activations are not finite."""
    for group, statistic in statistics.items():
        if not bool(torch.isfinite(statistic.norm).all()):
            raise ValueError(f"--model: NaN or infinite activations in block {group.block} of the dense model")
