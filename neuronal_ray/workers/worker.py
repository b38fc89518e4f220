"""A worker: one shard of the model on one device, and what tasks keep there from one call to the next.

Tasks are functions of a worker, in workers/tasks/; what passes from shard to shard is in workers/shard.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import LinearPruner, Ranks
from neuronal_ray.cli.threads import check_threads
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.workers.background import Background
from neuronal_ray.workers.masked_weights import MaskedWeights
from neuronal_ray.workers.replica import Replica, Statistics
from neuronal_ray.workers.search_text import SearchText
from neuronal_ray.workers.solved_levels import LevelStore
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.stopwatch import Stopwatch
from neuronal_ray.workers.thread_lanes import Lane, ThreadLanes


@dataclass
class Kept:
    """What tasks keep between calls; the thread lanes of a worker share it and do not change it.

    `statistics` are those of the whole calibration text on the dense model, `dense_norms` those of the search text.
    `ranks` lie on the device, or on the host where blocks are offloaded. `offloaded_ranks` are those of the block that
    was ranked last. `excerpts` are parts of the search text, by their sequences. `final_ranks` or `solved` are what
    `settle` made of the final model; with neither, final masks are read off `ranks`.
    """

    pruner: LinearPruner
    statistics: Statistics | None = None
    ranks: dict[Linear, Ranks] = field(default_factory=dict)
    offloaded_ranks: tuple[int, Mapping[Linear, Ranks]] | None = None
    solved_levels: LevelStore | None = None
    search_text: SearchText | None = None
    excerpts: dict[range, SearchText] = field(default_factory=dict)
    dense_norms: Statistics = field(default_factory=dict)
    final_ranks: dict[Linear, Ranks] = field(default_factory=dict)
    solved: dict[Linear, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class Worker:
    """State only. `parallel` is the number of tasks that run on this device at the same time, this one included.

    `upstream(task, *args)` runs a chain task on the shards before this one and returns what they hand over.
    """

    spec: WorkerSpec
    replica: Replica
    masked_weights: MaskedWeights
    kept: Kept
    parallel: int = 1
    upstream: Callable[..., Any] | None = None
    lanes: ThreadLanes | None = None
    files: Background[int] = field(default_factory=Background)

    @classmethod
    def build(cls, spec: WorkerSpec) -> "Worker":
        """Load a shard of the model. Raises BadInput for a checkpoint that cannot be used."""
        check_threads(spec.threads)
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        replica = Replica.load(
            spec.model_path,
            device=spec.device,
            dtype=spec.dtype,
            trust_remote_code=spec.trust_remote_code,
            synchronize=spec.profile,
            shard=spec.shard,
            shards=spec.shards,
            offload=spec.offload,
        )
        return cls(spec, replica, MaskedWeights(replica), Kept(spec.pruner))

    def on(self, lane: Lane) -> "Worker":
        """Return the worker that a task on a thread lane sees: the lane's replica, all else shared."""
        return Worker(self.spec, lane.replica, lane.masked_weights, self.kept, parallel=lane.parallel)

    @property
    def pruner(self) -> LinearPruner:
        """What chooses the weights of a linear."""
        return self.kept.pruner

    @property
    def device(self) -> torch.device:
        """Where texts and masked weights are."""
        return self.replica.device

    @property
    def host(self) -> torch.device:
        """Where rankings and solutions are kept: the CPU where blocks are offloaded, else the device."""
        return torch.device("cpu") if self.spec.offload else self.device

    @property
    def stopwatch(self) -> Stopwatch:
        """Where the time goes."""
        return self.replica.stopwatch

    @property
    def blocks(self) -> range:
        """The blocks of this shard."""
        return self.replica.blocks

    @property
    def layout(self) -> Layout:
        """The layout of the whole model; in a chain, once it was kept."""
        return self.replica.layout

    @property
    def is_last(self) -> bool:
        """Whether the last block is here, and with it the results of chain tasks."""
        return self.blocks.stop == self.replica.num_blocks

    @property
    def search_text(self) -> SearchText:
        """The text that candidates are compared on."""
        assert self.kept.search_text is not None, "set_search_text comes first"
        return self.kept.search_text

    def blocks_until(self, stop: int) -> range:
        """Return the blocks of this shard before block `stop`."""
        return range(self.blocks.start, max(self.blocks.start, min(self.blocks.stop, stop)))

    def on_device(self, statistics: Statistics) -> Statistics:
        """Return the statistics of this shard's blocks, on the device."""
        return {
            group: statistic.to(self.device) for group, statistic in statistics.items() if group.block in self.blocks
        }

    def close(self) -> None:
        """End what runs in the background."""
        self.files.end()
