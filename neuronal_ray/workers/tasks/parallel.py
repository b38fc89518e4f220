"""Tasks that run in parallel on one worker, on thread lanes; they change nothing that the worker keeps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar

import torch

from neuronal_ray.workers.shard import task_name
from neuronal_ray.workers.thread_lanes import ThreadLanes, lane_count
from neuronal_ray.workers.worker import Worker

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")


def parallel_tasks(worker: Worker) -> int:
    """Return how many tasks that only pass text through the model run in parallel on this worker.

    A solver uses all threads for its large products.
    """
    if worker.device.type != "cpu" or worker.spec.offload or worker.spec.shards > 1 or worker.pruner.solves:
        return 1
    return lane_count(torch.get_num_threads(), worker.replica.largest_block_bytes)


@dataclass(frozen=True)
class InParallel(Generic[Item, P, Result]):
    """`task` for several items at once.

    A single item has no more threads than one of several: the bits of a sum may depend on their number.
    """

    task: Callable[Concatenate[Worker, Item, P], Result]

    @property
    def name(self) -> str:
        """The name of the task that each item runs."""
        return task_name(self.task)

    def __call__(self, worker: Worker, items: Sequence[Item], /, *args: P.args, **kwargs: P.kwargs) -> list[Result]:
        """Return the results in the order of the items."""
        count = parallel_tasks(worker)
        if count == 1:
            return [self.task(worker, item, *args, **kwargs) for item in items]
        if worker.lanes is None:
            worker.lanes = ThreadLanes(worker.replica, count)
        return worker.lanes.map(lambda lane, item: self.task(worker.on(lane), item, *args, **kwargs), items)
