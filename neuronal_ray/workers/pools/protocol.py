"""The protocol of pools: where workers live, and how a driver runs tasks on them.

A task is a function of a worker and its arguments, or a ChainTask. A replica is a chain of workers that together hold
the model; a task runs on one worker of the chain after the other, and the last one has its result.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from neuronal_ray.cli.exit_codes import Unfinished
from neuronal_ray.workers.tasks.parallel import InParallel, parallel_tasks
from neuronal_ray.workers.worker import Worker

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskError(RuntimeError):
    """A fault of ours in a task; the message names the task, the item and the error, the cause has the traceback."""


class ResourceError(TaskError, Unfinished):
    """A task failed for want of disk space, memory or workers: where in the code it did is no help."""


class Pool(Protocol):
    """Replicas of one model. Results do not depend on how many there are."""

    @property
    def replicas(self) -> int:
        """Number of chains of workers that each hold the whole model."""
        ...

    @property
    def shards(self) -> int:
        """Number of workers in a chain."""
        ...

    def map(
        self,
        task: Callable[Concatenate[Worker, Item, P], Result],
        items: Iterable[Item],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Iterator[Result]:
        """Yield `task(worker, item, *args)` for every item, spread over the replicas, in the order of the items.

        An item is taken when a worker can start it, so that items can be made while earlier ones are under way. Raises
        BadInput as the task did, and TaskError for any other error.
        """
        ...

    def each(
        self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """Return `task(worker, *args)` of every worker of every replica; of a ChainTask one result per replica.

        A worker that takes the place of a lost one repeats the calls of `each`; a call replaces earlier ones of the
        same task.
        """
        ...

    def each_also(
        self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """Do `each` for a task whose earlier calls stay in force."""
        ...

    def first(self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        """Return `task(worker, *args)` of the first replica."""
        ...

    def begin(self) -> None:
        """Forget the calls of `each` so far: what follows does not depend on them."""
        ...

    def close(self) -> None:
        """Let go of the workers."""
        ...


def map_in_parallel(
    pool: Pool,
    task: Callable[Concatenate[Worker, Item, P], Result],
    items: Iterable[Item],
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> Iterator[Result]:
    """Do `pool.map` for tasks that only pass text through the model: as many at once as a worker has thread lanes."""
    size = pool.first(parallel_tasks)
    if size == 1:
        yield from pool.map(task, items, *args, **kwargs)
        return
    for results in pool.map(InParallel(task), _in_groups(items, size), *args, **kwargs):
        yield from results


def _in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the next `size` items each time, taken when they are needed."""
    remaining = iter(items)
    while group := list(islice(remaining, size)):
        yield group
