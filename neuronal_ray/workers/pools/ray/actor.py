"""A worker in a Ray actor: built, brought to the state of the others, and given tasks."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import torch
from ray.util.metrics import Counter, Gauge

from neuronal_ray.workers.pools.ray.gpus import own_device
from neuronal_ray.workers.pools.ray.tensors import send_bytes_of_tensors
from neuronal_ray.workers.shard import run_task, task_name
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.statistics import peak_memory
from neuronal_ray.workers.worker import Worker


@dataclass(frozen=True, eq=False)
class Call:
    """A task with its arguments: references to those by position, values of those by name."""

    task: Callable[..., Any]
    args: tuple[ray.ObjectRef, ...]
    kwargs: Mapping[str, object]


def _pass_along(actors: Sequence[ray.actor.ActorHandle], task: Callable[..., object], *args: object) -> Any:
    """Return what the shards before hand over, queried from within a task of a later shard."""
    handover = None
    for actor in actors:
        handover = actor.call.remote(handover, task, {}, *args)
    return ray.get(handover)


class ShardActor:
    """A worker behind Ray; built by a call, not by the constructor: only a call's error reaches the driver whole."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        send_bytes_of_tensors()
        self._tasks = Counter("neuronal_ray_tasks", "Tasks done, candidates among them.", ("task",))
        self._seconds = Counter("neuronal_ray_task_seconds", "Seconds in tasks.", ("task",))
        self._tokens = Counter("neuronal_ray_tokens", "Tokens that passed through one block.", ())
        self._memory = Gauge("neuronal_ray_peak_memory_bytes", "The most that the worker has held.", ("device",))
        self._counted = 0

    def build(self, spec: WorkerSpec, before: Sequence[ray.actor.ActorHandle]) -> None:
        """Load the shard from the node's copy of the checkpoint; `before` are the earlier actors of the chain."""
        if spec.device == "cuda":
            spec = replace(spec, device=own_device())
            torch.cuda.set_device(spec.device)  # for kernels that launch on the current device
        self._worker = Worker.build(spec)
        if before:
            self._worker.upstream = partial(_pass_along, before)

    def repeat(self, handovers: Sequence[object] | None, calls: Sequence[Call], built: None) -> list[object]:
        """Make the calls that brought the other workers to their state, after `build`.

        `handovers` is what the shard before returned for each.
        """
        before = [None] * len(calls) if handovers is None else handovers
        return [
            self.call(handover, call.task, call.kwargs, *ray.get(list(call.args)))
            for handover, call in zip(before, calls, strict=True)
        ]

    def call(
        self, handover: object, task: Callable[..., object], kwargs: Mapping[str, object], *args: object
    ) -> object:
        """Run a task, given what the shard before returned."""
        assert self._worker is not None, "built before it is called"
        begin = time.perf_counter()
        result = run_task(self._worker, handover, task, *args, **kwargs)
        self._count(task_name(task), time.perf_counter() - begin)
        return result

    def _count(self, name: str, seconds: float) -> None:
        """Add to Ray's own metrics endpoint."""
        assert self._worker is not None
        tokens = self._worker.replica.tokens
        self._tasks.inc(1, {"task": name})
        self._seconds.inc(max(seconds, 1e-9), {"task": name})
        if tokens > self._counted:
            self._tokens.inc(tokens - self._counted)
            self._counted = tokens
        self._memory.set(peak_memory(self._worker), {"device": str(self._worker.device)})
