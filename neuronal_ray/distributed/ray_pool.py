"""The Ray pool: one actor per replica holds model, rankings and dense activations; tasks come to it by reference."""

import dataclasses
import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from neuronal_ray.pool import TaskError, task_name
from neuronal_ray.worker import Worker, WorkerSpec

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_ACTOR = 2
_OBJECT_STORE_BYTES = 2**30
_START_TIMEOUT_S = 1800.0
_REACH_TIMEOUT_S = 10.0


class _ReplicaActor:
    """A worker in a process of its own. Built by a call, not here: only a call's error reaches the driver whole."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def build(self, spec: WorkerSpec) -> None:
        """Build the worker; raises what the worker raises."""
        self._worker = Worker(spec)

    def call(self, task: Callable[..., Result], *args: object) -> Result:
        """`task(worker, *args)`."""
        assert self._worker is not None
        return task(self._worker, *args)


class RayPool:
    """See Pool. Joins the Ray at `address` ("local": starts one, ended by `close`)."""

    def __init__(self, spec: WorkerSpec, *, address: str, replicas: int | None) -> None:
        self._started_ray = not ray.is_initialized()
        self._actors: list[ray.actor.ActorHandle] = []
        _connect(address)
        try:
            self._start_actors(spec, replicas)
        except BaseException:
            self.close()
            raise

    @property
    def replicas(self) -> int:
        """Number of actors."""
        return len(self._actors)

    def map(self, task: Callable[..., Result], items: Sequence[Item], *shared: object) -> Iterator[Result]:
        """See Pool. At most two tasks per actor are under way; results that come early wait for their turn."""
        references = [ray.put(value) for value in shared]
        flight: dict[ray.ObjectRef, tuple[int, int]] = {}
        load = [0] * len(self._actors)
        done: dict[int, Result] = {}
        submitted = 0
        for turn in range(len(items)):
            while turn not in done:
                while submitted < len(items) and min(load) < _IN_FLIGHT_PER_ACTOR:
                    actor = load.index(min(load))
                    reference = self._actors[actor].call.remote(task, items[submitted], *references)
                    flight[reference] = (submitted, actor)
                    load[actor] += 1
                    submitted += 1
                (ready, *_), _ = ray.wait(list(flight), num_returns=1)
                index, actor = flight.pop(ready)
                load[actor] -= 1
                done[index] = _result(ready, f"{task_name(task)}, item {index + 1} of {len(items)}")
            yield done.pop(turn)

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """See Pool."""
        references = [ray.put(value) for value in shared]
        calls = [actor.call.remote(task, *references) for actor in self._actors]
        return [_result(call, f"{task_name(task)}, worker {index + 1}") for index, call in enumerate(calls)]

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """See Pool."""
        result: Result = _result(self._actors[0].call.remote(task, *args), task_name(task))
        return result

    def close(self) -> None:
        """Kill the actors and, if this pool started a Ray, end it."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started_ray:
            ray.shutdown()

    def _start_actors(self, spec: WorkerSpec, replicas: int | None) -> None:
        resources = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        on_gpu = spec.device == "cuda" or (spec.device == "auto" and num_gpus > 0)
        nodes = sum(node["Alive"] for node in ray.nodes())
        count = replicas or (num_gpus if on_gpu else nodes)
        if on_gpu and count > num_gpus:
            raise ValueError(f"--replicas: {count} workers need {count} GPUs, the Ray cluster has {num_gpus}")
        if count > num_cpus:
            raise ValueError(f"--replicas: {count} workers need {count} CPUs, the Ray cluster has {num_cpus}")
        threads = spec.threads or max(1, num_cpus // count)
        spec = dataclasses.replace(spec, device="cuda" if on_gpu else "cpu", threads=threads)
        actor = ray.remote(_ReplicaActor).options(
            num_gpus=1 if on_gpu else 0,
            num_cpus=min(threads, num_cpus // count),
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
            allow_out_of_order_execution=True,
        )
        self._actors = [actor.remote() for _ in range(count)]
        builds = [handle.build.remote(spec) for handle in self._actors]
        for index, build in enumerate(builds):
            _result(build, f"start of worker {index + 1}", timeout=_START_TIMEOUT_S)


def _connect(address: str) -> None:
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks under way when another's error was raised
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        return
    _check_reachable(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ValueError(f"--address: no Ray to join at {address!r}; start one, or use --address local") from error


def _check_reachable(address: str) -> None:
    """Raise ValueError when nothing listens at HOST:PORT or ray://HOST:PORT: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(
            f"--address: {address!r} is no address, expected none, local, auto, HOST:PORT or ray://HOST:PORT"
        )
    try:
        socket.create_connection((host, int(port)), timeout=_REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"--address: nothing to join at {address!r} ({error}); is Ray running there?") from error


def _result(reference: ray.ObjectRef, item: str, *, timeout: float | None = None) -> Any:
    """The value, or the error of the task said once: ValueError as it was, anything else as TaskError."""
    try:
        return ray.get(reference, timeout=timeout)
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise TaskError(f"{item} failed:\n{error}") from error
    except RayActorError as error:
        reason = str(error).strip().splitlines()[0]
        raise TaskError(f"{item}: its worker died ({reason}); was the node short of memory?") from error
    except GetTimeoutError as error:
        free = ray.available_resources()
        raise TaskError(f"{item}: not ready after {timeout:.0f} s; free in the cluster: {free}") from error
