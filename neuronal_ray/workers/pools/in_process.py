"""The pool of one process, without Ray: one replica, its shards on the CPU or on one GPU each."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import TypeVar

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.pools.protocol import ResourceError, TaskError, task_name
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.worker import Worker

Item = TypeVar("Item")
Result = TypeVar("Result")


class InProcessPool:
    """One replica in this process, no Ray; its shards on the CPU, or on one GPU each."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._workers = [Worker(_on_device(replace(spec, shard=shard))) for shard in range(spec.shards)]
        if spec.shards > 1:
            self._workers[-1].set_upstream(partial(_before_last, self._workers[:-1]))
            self.each(Worker.keep_layout, self.first(Worker.trace))

    @property
    def replicas(self) -> int:
        """One."""
        return 1

    @property
    def shards(self) -> int:
        """See Pool."""
        return len(self._workers)

    def map(self, task: Callable[..., Result], items: Iterable[Item], *shared: object) -> Iterator[Result]:
        """See Pool."""
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        for index, item in enumerate(items):
            yield self._results(task, f"item {index + 1}{total}", item, *shared)[-1]

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """See Pool."""
        return self._results(task, "worker 1", *shared)

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """See Pool."""
        return self._results(task, "worker 1", *args)[-1]

    def begin(self) -> None:
        """See Pool: this worker is lost with its process."""

    def close(self) -> None:
        """See Pool."""
        for worker in self._workers:
            worker.close()
        del self._workers

    def _results(self, task: Callable[..., Result], item: str, *args: object) -> list[Result]:
        """What each shard returned, given what the one before it did."""
        results: list[Result] = []
        for worker in self._workers:
            handed = results[-1] if results else None
            results.append(_said_once(task, item, lambda: worker.relay(handed, task, *args)))  # noqa: B023
        return results


def _before_last(workers: Sequence[Worker], task: Callable[..., Result], *args: object) -> Result | None:
    """What the shards before the last hand to it."""
    handed: Result | None = None
    for worker in workers:
        handed = worker.relay(handed, task, *args)
    return handed


def _on_device(spec: WorkerSpec) -> WorkerSpec:
    return replace(spec, device=f"cuda:{spec.shard}") if spec.device == "cuda" and spec.shards > 1 else spec


def _said_once(task: Callable[..., Result], item: str, call: Callable[[], Result]) -> Result:
    """Return `call()`; raise its BadInput as it is, any other error of it as TaskError from that error."""
    try:
        return call()
    except BadInput:
        raise
    except OSError as error:  # a full disk, say: where in the code is no help
        raise ResourceError(f"{task_name(task)}, {item}: {error}") from error
    except Exception as error:
        raise TaskError(f"{task_name(task)}, {item} failed: {type(error).__name__}: {error}") from error
