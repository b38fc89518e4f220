"""A shard in a process of its own: it is built, brought to the others' state, and given tasks."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import ray
from ray.util.metrics import Counter, Gauge

from neuronal_ray.workers.pools.protocol import task_name
from neuronal_ray.workers.pools.ray.tensors import send_bytes_of_tensors
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.worker import Worker

Result = TypeVar("Result")
Call = tuple[Callable[..., object], tuple[ray.ObjectRef, ...]]


def _asked(actors: Sequence[ray.actor.ActorHandle], task: Callable[..., object], *args: object) -> object:
    """What the shards before hand on, to be asked for within a task of a later one."""
    handed = None
    for actor in actors:
        handed = actor.call.remote(handed, task, *args)
    return ray.get(handed)


class ShardActor:
    """A worker behind Ray. Built by a call, not by its constructor: only a call's error reaches the driver whole."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        send_bytes_of_tensors()
        self._tasks = Counter("neuronal_ray_tasks", "Tasks done, candidates among them.", ("task",))
        self._seconds = Counter("neuronal_ray_task_seconds", "Seconds in tasks.", ("task",))
        self._tokens = Counter("neuronal_ray_tokens", "Tokens that passed through one block.", ())
        self._memory = Gauge("neuronal_ray_peak_memory_bytes", "The most that the worker has held.", ("device",))
        self._counted = 0

    def build(self, spec: WorkerSpec, before: Sequence[ray.actor.ActorHandle]) -> None:
        """Read the shard from the node's copy of the checkpoint; raises what that raises. `before` are its chain's."""
        self._worker = Worker(spec)
        if before:
            self._worker.set_upstream(partial(_asked, before))

    def repeat(self, handed: Sequence[object] | None, calls: Sequence[Call], built: None) -> list[object]:
        """Make the calls that brought the others to their state, after `build`.

        `handed` is what the shard before returned.
        """
        before = [None] * len(calls) if handed is None else handed
        return [
            self.call(one, task, *ray.get(list(references)))
            for one, (task, references) in zip(before, calls, strict=True)
        ]

    def call(self, handed: object, task: Callable[..., Result], *args: object) -> Result:
        """`task(worker, *args)`, given what the shard before returned."""
        assert self._worker is not None, "built before it is called"
        begin = time.perf_counter()
        result = self._worker.relay(handed, task, *args)
        self._count(task_name(task), time.perf_counter() - begin)
        return result

    def _count(self, name: str, seconds: float) -> None:
        """On Ray's own metrics endpoint."""
        assert self._worker is not None
        tokens = self._worker.replica.tokens
        self._tasks.inc(1, {"task": name})
        self._seconds.inc(max(seconds, 1e-9), {"task": name})
        if tokens > self._counted:
            self._tokens.inc(tokens - self._counted)
            self._counted = tokens
        self._memory.set(self._worker.peak_memory(), {"device": str(self._worker.device)})
