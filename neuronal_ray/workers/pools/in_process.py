"""The pool of one process, without Ray: one replica, its shards on the CPU or on one GPU each."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Concatenate, ParamSpec, TypeVar

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.pools.protocol import ResourceError, TaskError
from neuronal_ray.workers.shard import Handover, run_task, task_name
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.statistics import keep_layout, trace
from neuronal_ray.workers.worker import Worker

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")


class InProcessPool:
    """See Pool. Results are those of the last shard."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._workers = [Worker.build(_on_device(replace(spec, shard=shard))) for shard in range(spec.shards)]
        if spec.shards > 1:
            self._workers[-1].upstream = partial(_pass_along, self._workers[:-1])
            self.each(keep_layout, self.first(trace))

    @property
    def replicas(self) -> int:
        """One."""
        return 1

    @property
    def shards(self) -> int:
        """See Pool."""
        return len(self._workers)

    def map(
        self,
        task: Callable[Concatenate[Worker, Item, P], Result],
        items: Iterable[Item],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Iterator[Result]:
        """See Pool."""
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        for index, item in enumerate(items):
            yield self._results(f"item {index + 1}{total}", task, item, *args, **kwargs)[-1]

    def each(
        self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """See Pool."""
        return self._results("worker 1", task, *args, **kwargs)

    def each_also(
        self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """See Pool: this worker is lost with its process, nothing is repeated."""
        return self.each(task, *args, **kwargs)

    def first(self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        """See Pool."""
        return self._results("worker 1", task, *args, **kwargs)[-1]

    def begin(self) -> None:
        """See Pool: nothing is repeated."""

    def close(self) -> None:
        """See Pool."""
        for worker in self._workers:
            worker.close()
        del self._workers

    def _results(self, where: str, task: Callable[..., Result], *args: Any, **kwargs: Any) -> list[Result]:
        """Return what the shards returned, without what one handed to the next."""
        results: list[Any] = []
        for worker in self._workers:
            handover = results[-1] if results else None
            results.append(_called(worker, handover, task, where, *args, **kwargs))
        return [result for result in results if not isinstance(result, Handover)]


def _called(
    worker: Worker, handover: object, task: Callable[..., Any], where: str, *args: object, **kwargs: object
) -> object:
    """Run the task on one shard; BadInput passes as it is, any other error becomes TaskError."""
    try:
        return run_task(worker, handover, task, *args, **kwargs)
    except BadInput:
        raise
    except OSError as error:  # a full disk, for example: where in the code is no help
        raise ResourceError(f"{task_name(task)}, {where}: {error}") from error
    except Exception as error:
        raise TaskError(f"{task_name(task)}, {where} failed: {type(error).__name__}: {error}") from error


def _pass_along(workers: Sequence[Worker], task: Callable[..., Any], *args: object) -> Any:
    """Return what the shards before the last hand to it."""
    handover: object = None
    for worker in workers:
        handover = run_task(worker, handover, task, *args)
    return handover


def _on_device(spec: WorkerSpec) -> WorkerSpec:
    return replace(spec, device=f"cuda:{spec.shard}") if spec.device == "cuda" and spec.shards > 1 else spec
