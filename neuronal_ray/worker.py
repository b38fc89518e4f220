"""The tasks of a worker: it gathers statistics and ranks, settles masks or weights in the end, and writes the result.

What it does besides, layer by layer: chain.py (it may be one shard of several), block_work.py (one block),
candidate_tasks.py (how good a plan is), solver_tasks.py (the same for methods that solve), probe_tasks.py (what
allocations ask).
"""

import copy
import hashlib
import os
import platform
import resource
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuronal_ray.background import Background
from neuronal_ray.block_work import check_finite
from neuronal_ray.core.layout import Group, Linear
from neuronal_ray.core.masks import cut
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.kernels.memory import keep_freed_memory
from neuronal_ray.lanes import Lane, Lanes, lane_count
from neuronal_ray.models.blocks import is_transposed
from neuronal_ray.models.copies import copy_tensors, new_part, write_weights, zero_masked
from neuronal_ray.models.parts import Part, stored_tensors
from neuronal_ray.probe_tasks import ProbeTasks
from neuronal_ray.recipe import Ranks, Recipe
from neuronal_ray.replica import Statistics, Stopped, Weights, chunk_sequences
from neuronal_ray.solver_tasks import SolverTasks
from neuronal_ray.worker_spec import Walk, WorkerSpec

Item = TypeVar("Item")
Result = TypeVar("Result")


class Worker(SolverTasks, ProbeTasks):
    """See the module's docstring. Methods are called in the order: observe, rank, set_search_text, trial, finish."""

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        super().__init__(spec)
        self._final: dict[Linear, Ranks] = {}
        self._solved: dict[Linear, Tensor] = {}
        self._lanes: Lanes | None = None
        self._ahead: Background[int] = Background()
        blocks = self.replica.stream.blocks
        self._largest_block = max(
            sum(parameter.nbytes for parameter in blocks[index].parameters()) for index in self.blocks
        )

    # -- side by side ------------------------------------------------------------------------------------------

    def at_once(self) -> int:
        """How many tasks that ask for no more than a pass this worker takes side by side (see lanes.py).

        A solver wants all threads for its large products.
        """
        if self.device.type != "cpu" or self.spec.streams or self.spec.shards > 1 or self.recipe.solves:
            return 1
        return lane_count(torch.get_num_threads(), self._largest_block)

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

    def use(self, recipe: Recipe) -> None:
        """Choose weights by `recipe` from now on; rankings and what was made of them are dropped."""
        self.recipe, self._ranks, self._visiting, self._levels = recipe, {}, None, None
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
        self._statistics, self._visiting = self._here(statistics), None

    def rank(self) -> None:
        """Rank the rows of every linear once, by the method's score on the dense stream's statistics.

        Blocks that visit are ranked when they do: a GPU sorts their rows in less time than rankings take to come.
        """
        if self.spec.streams:
            return
        for index in self.blocks:
            self._ranks |= self._rank_block(index, self._statistics)

    def rank_on_walk(self, tokens: Int64[Tensor, "sequences length"]) -> None:
        """`rank` for statistics that are held for one block at a time."""
        assert self.recipe.statistic is not None
        (recordings,), _ = self._take([self.replica.start(tokens)[1]], None)
        for index, recordings, (observed,) in self._dense_walk(recordings, (self.recipe.statistic,)):  # noqa: B007, B020
            self._ranks |= self._kept(self._rank_block(index, observed))
        return self._give([recordings], None, lambda: None)

    # -- the pruned stream: the released code's order, each block after its pruned predecessors ---------------

    def finish(self, plan: Plan, tokens: Int64[Tensor, "sequences length"], walk: Walk) -> None:
        """Settle the masks, or weights, that the model has under `plan` in the end.

        A ranking on the dense stream is settled already; else `tokens` pass through, block after block.
        """
        recipe = self.recipe
        self._final, self._solved = dict(self._ranks), {}
        if not walk.pruned and not recipe.walks:
            if recipe.refinement is not None:
                for index in self.replica.visited(self.blocks):
                    refined = self._refined(index, plan, self._ranking(index), self._statistics, self._statistics)
                    self._final |= self._kept(refined)
            return None
        (recordings,), _ = self._take([self.replica.start(tokens, chunk=1 if walk.released else None)[1]], None)
        kinds = walk.kinds(recipe.final_statistics)
        for index in self.replica.visited(self.blocks):
            with self.stopwatch.measure("dense pass"):
                outputs, observed = self.replica.run(index, recordings, kinds)
            for statistics in observed:
                check_finite(statistics)
            weights, ranks = self._pruned_block(index, plan, observed)
            self._final |= self._kept(ranks)
            if recipe.solves:
                self._solved |= {linear: weight.to(self._host) for linear, weight in weights.items()}
            if walk.pruned:
                outputs, _ = self.replica.run_with(index, recordings, weights)
            recordings = outputs
        return self._give([recordings], None, lambda: None)

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
        return self._cut(index, plan, self._final or self._ranking(index), lasting=lasting)

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
        return cut((self._final or self._ranking(linear.block))[linear], plan.removed[linear])

    def sees(self, folder: Path) -> None:
        """Raise ValueError when the output directory cannot be written from here."""
        if not os.access(folder, os.W_OK):
            raise ValueError(
                f"--output: the worker on {platform.node()} cannot write to {folder.parent}; name a directory on "
                "storage that all nodes share"
            )

    def write_ahead(self, part: Part, plan: Plan, target: Path) -> None:
        """Begin to `write` beside the tasks to come; see `written`. Of what is final now: it may change meanwhile.

        Not where blocks visit and are ranked when they do: there is one place for a visit.
        """
        if part.blocks.start in self.blocks and (not self.spec.streams or self._solved or self._final):
            self._ahead.begin(part.file, partial(copy.copy(self)._write, part, plan, target))

    def written(self, patience_s: float) -> dict[str, int | None]:
        """What `write` would return for each file that was begun ahead, None if it is not done after `patience_s`."""
        return self._ahead.found(patience_s)

    def write(self, part: Part, plan: Plan, target: Path) -> int:
        """Write one file of the final model under `plan` into `target`; the zeros among its linears' weights."""
        if part.blocks.start not in self.blocks:
            return cast(int, self._handed)
        return self._write(part, plan, target, threading.Event())

    def _write(self, part: Part, plan: Plan, target: Path, stop: threading.Event) -> int:
        assert part.blocks.stop <= self.blocks.stop, "a part lies within a shard"
        try:
            return self._written(part, plan, target, stop)
        except OSError as error:  # a full disk, say
            raise OSError(f"{part.file}: {error}") from error

    def _written(self, part: Part, plan: Plan, target: Path, stop: threading.Event) -> int:
        keep_freed_memory()  # for one mask after the other
        source = self.replica.checkpoint
        written = new_part(source, part, target)
        put = write_weights if self._solved else zero_masked
        zeros, others = 0, dict.fromkeys(part.names)
        for block in part.blocks:
            if stop.is_set():
                raise Stopped
            values = {}
            for spec in self.layout.blocks[block]:
                value = self._solved[spec.linear] if self._solved else self.mask(spec.linear, plan)
                values[self.replica.name(spec)] = value.t() if is_transposed(self.replica.module(spec)) else value
            found = put(source, written, stored_tensors(self.replica.stream.model, values))
            zeros += sum(found.values())
            for name in found:
                del others[source.stored_name(name)]
        copy_tensors(source, written, others)
        return zeros

    def close(self) -> None:
        """End what goes on beside tasks."""
        self._ahead.end()


def _joined(chunks: Iterator[Tensor]) -> Tensor:
    return torch.cat(list(chunks))
