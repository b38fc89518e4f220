"""The tasks of a worker: it gathers statistics and ranks, and takes several tasks side by side where that pays.

What it does besides, layer by layer: workers/shard.py (it may be one shard of several), workers/block_work.py (one block),
workers/tasks/candidates.py (how good a plan is), workers/tasks/solver_candidates.py (the same for methods that solve), workers/tasks/probes.py (what
allocations ask), workers/tasks/final_model.py (the final model and its files).
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.memory import peak_bytes
from neuronal_ray.core.layout import Group
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.workers.replica import Statistics, chunk_sequences
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.final_model import ResultTasks
from neuronal_ray.workers.thread_lanes import Lane, Lanes, lane_count

Item = TypeVar("Item")
Result = TypeVar("Result")


class Worker(ResultTasks):
    """See the module's docstring. Methods are called in the order: observe, rank, set_search_text, trial, finish."""

    def __init__(self, spec: WorkerSpec) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        super().__init__(spec)
        self._lanes: Lanes | None = None
        blocks = self.replica.stream.blocks
        self._largest_block = max(
            sum(parameter.nbytes for parameter in blocks[index].parameters()) for index in self.blocks
        )

    # -- side by side ------------------------------------------------------------------------------------------

    def at_once(self) -> int:
        """How many tasks that ask for no more than a pass this worker takes side by side (see workers/thread_lanes.py).

        A solver wants all threads for its large products.
        """
        if self.device.type != "cpu" or self.spec.streams or self.spec.shards > 1 or self.pruner.solves:
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

    def use(self, pruner: LinearPruner) -> None:
        """Choose weights by `pruner` from now on; rankings and what was made of them are dropped."""
        self.pruner, self._ranks, self._visiting, self._levels = pruner, {}, None, None
        self.unfinish()

    def peak_memory(self) -> int:
        """Bytes: the most that was allocated on a GPU, or that this process was resident in."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_bytes()

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
        assert self.pruner.statistic is not None
        (recordings,), _ = self._take([self.replica.start(tokens)[1]], None)
        for index, recordings, (observed,) in self._dense_walk(recordings, (self.pruner.statistic,)):  # noqa: B007, B020
            self._ranks |= self._kept(self._rank_block(index, observed))
        return self._give([recordings], None, lambda: None)
