"""One replica on Ray: a chain of actors that hold the shards, and how the result or the loss of a task shows."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.pools.protocol import ResourceError, TaskError
from neuronal_ray.workers.pools.ray.actor import Call, ShardActor
from neuronal_ray.workers.spec import WorkerSpec

_NO_RETRIES = {"max_restarts": 0, "max_task_retries": 0, "allow_out_of_order_execution": True}  # the pool retries
_LOSSES = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)


@dataclass(eq=False)
class Chain:
    """The actors of one replica, first blocks first; `building` until tasks can be given to it.

    `missed` are the calls of `each` since it was begun, `failures` the number of chains before it that were lost while
    they were built, `load` the number of its tasks under way, `since` the time when it last began or ended one.
    """

    actors: list[ray.actor.ActorHandle]
    group: PlacementGroup | None
    building: ray.ObjectRef | None
    missed: list[Call] = field(default_factory=list)
    failures: int = 0
    load: int = 0
    since: float = field(default_factory=time.monotonic)

    def call(self, call: Call, *first: object) -> list[ray.ObjectRef]:
        """Return references to what each shard will return; handovers go from actor to actor, not by the driver.

        `first` are arguments in front of those of the call.
        """
        references: list[ray.ObjectRef] = []
        for actor in self.actors:
            handover = references[-1] if references else None
            references.append(actor.call.remote(handover, call.task, call.kwargs, *first, *call.args))
        return references

    def end(self) -> None:
        """Kill the actors and give their places back."""
        for actor in self.actors:
            with suppress(RayActorError):
                ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)


def new_chain(spec: WorkerSpec, needs: Mapping[str, float], calls: Sequence[Call]) -> Chain:
    """Start the actors of a replica, `needs` each, and have them built and brought to the state that `calls` make."""
    group = None
    if spec.shards > 1:
        bundle = {name: amount for name, amount in (("CPU", needs["num_cpus"]), ("GPU", needs["num_gpus"])) if amount}
        group = placement_group([bundle] * spec.shards, strategy="PACK")  # one node if there is room, else few
    actors = []
    for shard in range(spec.shards):
        strategy: object = "SPREAD"
        if group is not None:
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=shard)
        options = {**needs, "scheduling_strategy": strategy}
        actors.append(ray.remote(ShardActor).options(**options, **_NO_RETRIES).remote())
    built = [actor.build.remote(replace(spec, shard=shard), actors[:shard]) for shard, actor in enumerate(actors)]
    handovers = None
    for actor, reference in zip(actors, built, strict=True):
        handovers = actor.repeat.remote(handovers, list(calls), reference)
    return Chain(actors, group, handovers)


class WorkerLost(Exception):
    """The worker of a task, or the object that it left, is gone; the task can be repeated."""


def new_call(task: Callable[..., Any], args: tuple[object, ...], kwargs: dict[str, object]) -> Call:
    """Return a call whose arguments by position lie in Ray's object store once, for all actors."""
    return Call(task, tuple(ray.put(value) for value in args), kwargs)


def result_of(reference: ray.ObjectRef, name: str, *, timeout: float | None = None) -> Any:
    """Return the value of a task; raise its error once: BadInput as it is, any other as TaskError called `name`.

    The cause of a TaskError is Ray's own error, which has the remote traceback.

    Raises WorkerLost when the worker is gone, or when the task is not done in time.
    """
    try:
        return ray.get(reference, timeout=timeout)
    except _LOSSES as error:  # before RayTaskError: one that wraps it is both
        raise WorkerLost(f"its worker died ({str(error).strip().splitlines()[0]})") from error
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):  # of a shard that a later one waited for
            cause = cause.cause
        if isinstance(cause, BadInput):
            raise cause from None
        if isinstance(cause, OSError):  # a full disk, for example: where in the code is no help
            raise ResourceError(f"{name}: {cause}") from error
        raise TaskError(f"{name} failed: {type(cause).__name__}: {cause}") from error
    except GetTimeoutError as error:
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise WorkerLost(f"not done after {timeout:.0f} s, free in the cluster: {free}") from error
