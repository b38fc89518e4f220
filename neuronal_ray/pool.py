"""Where workers live: the protocol that searches and evaluations are written against, and the in-process pool.

A task is a function of a worker and its arguments, `Worker.trial` for example; it is sent as it is.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

from neuronal_ray.worker import Worker, WorkerSpec

Item = TypeVar("Item")
Result = TypeVar("Result")


class TaskError(RuntimeError):
    """A task failed for a reason of its own; says which item, and where."""


class Pool(Protocol):
    """Replicas of one model. Results do not depend on how many there are."""

    @property
    def replicas(self) -> int:
        """Number of workers."""
        ...

    def map(self, task: Callable[..., Result], items: Sequence[Item], *shared: object) -> Iterator[Result]:
        """`task(worker, item, *shared)` for every item, spread over the workers; results in the order of items."""
        ...

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """`task(worker, *shared)` on every worker; it sets what an earlier call of the same task had set."""
        ...

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """`task(worker, *args)` on the first worker."""
        ...

    def begin(self) -> None:
        """What `each` brings workers to from now on needs nothing of what it brought them to before.

        A worker that takes the place of a lost one repeats the calls of `each` since then.
        """
        ...

    def close(self) -> None:
        """Let go of the workers."""
        ...


class InProcessPool:
    """One worker in this process, no Ray."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = Worker(spec)

    @property
    def replicas(self) -> int:
        """One."""
        return 1

    def map(self, task: Callable[..., Result], items: Sequence[Item], *shared: object) -> Iterator[Result]:
        """See Pool."""
        for index, item in enumerate(items):
            yield _said_once(task, f"item {index + 1} of {len(items)}", self._worker, item, *shared)

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """See Pool."""
        return [_said_once(task, "worker 1", self._worker, *shared)]

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """See Pool."""
        return _said_once(task, "worker 1", self._worker, *args)

    def begin(self) -> None:
        """See Pool: this worker is lost with its process."""

    def close(self) -> None:
        """See Pool."""
        del self._worker


def task_name(task: Callable[..., object]) -> str:
    """What errors call a task."""
    return task.func.__qualname__ if isinstance(task, partial) else task.__qualname__


def _said_once(task: Callable[..., Result], item: str, *args: object) -> Result:
    """`task(*args)`; its ValueError as it is, any other error of it as TaskError."""
    try:
        return task(*args)
    except ValueError:
        raise
    except Exception as error:
        raise TaskError(f"{task_name(task)}, {item} failed: {type(error).__name__}: {error}") from error
