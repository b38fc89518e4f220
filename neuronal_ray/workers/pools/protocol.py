"""Where workers live: the protocol that searches and evaluations are written against, and the in-process pool.

A task is a function of a worker and its arguments, `Worker.trial` for example; it is sent as it is. A replica is a
chain of workers that together hold the model; a task runs on one after the other (Worker.relay), and what the last one
returns is its result.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from neuronal_ray.cli.exit_codes import Unfinished
from neuronal_ray.workers.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskError(RuntimeError):
    """A task failed by a fault of ours; the message names the task and the item, the cause has the traceback."""


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

    def map(self, task: Callable[..., Result], items: Iterable[Item], *shared: object) -> Iterator[Result]:
        """`task(worker, item, *shared)` for every item, spread over the replicas; results in the order of items.

        An item is asked for when a worker can take it: those that take time to make can be made meanwhile.
        """
        ...

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """`task(worker, *shared)` on every worker of every replica, and what each returned.

        It sets what an earlier call of the same task had set.
        """
        ...

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """`task(worker, *args)` on the first replica."""
        ...

    def begin(self) -> None:
        """What `each` brings workers to from now on needs nothing of what it brought them to before.

        A worker that takes the place of a lost one repeats the calls of `each` since then.
        """
        ...

    def close(self) -> None:
        """Let go of the workers."""
        ...


def map_side_by_side(
    pool: Pool, task: Callable[..., Result], items: Iterable[Item], *shared: object
) -> Iterator[Result]:
    """`pool.map` of tasks that only pass text through the model: as many to a worker as go side by side there."""
    size = pool.first(Worker.at_once)
    if size == 1:
        yield from pool.map(task, items, *shared)
        return
    for found in pool.map(partial(_side_by_side, task), _in_groups(items, size), *shared):
        yield from found


def _side_by_side(task: Callable[..., Result], worker: Worker, items: Sequence[Item], *shared: object) -> list[Result]:
    return worker.side_by_side(items, task, *shared)


def _in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The next `size` items each time, asked for when they are wanted."""
    coming = iter(items)
    while group := list(islice(coming, size)):
        yield group


def task_name(task: Callable[..., object]) -> str:
    """What errors and metrics call a task; one that wraps another is called after that, a worker's whichever of its
    layers has it.
    """
    if isinstance(task, partial):
        return task_name(task.args[0] if task.args and callable(task.args[0]) else task.func)
    return f"Worker.{task.__name__}" if getattr(Worker, task.__name__, None) is task else task.__qualname__
