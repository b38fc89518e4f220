"""The Ray pool: one actor per replica holds model, rankings and dense activations; tasks come to it by reference."""

import dataclasses
import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import Any, TypeVar

import ray
from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from neuronal_ray.pool import TaskError, task_name
from neuronal_ray.worker import Worker, WorkerSpec

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_IN_FLIGHT_PER_ACTOR = 2
_MOST_LOSSES = 3
_OBJECT_STORE_BYTES = 2**30
_START_TIMEOUT_S = 1800.0
_REACH_TIMEOUT_S = 10.0


_Call = tuple[Callable[..., object], tuple[ray.ObjectRef, ...]]


class _ReplicaActor:
    """A worker in a process of its own. Built by a call, not here: only a call's error reaches the driver whole."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def build(self, spec: WorkerSpec, calls: Sequence[_Call]) -> None:
        """Build the worker and repeat the calls that brought the others to their state; raises what they raise."""
        self._worker = Worker(spec)
        for task, references in calls:
            task(self._worker, *ray.get(list(references)))

    def call(self, task: Callable[..., Result], *args: object) -> Result:
        """`task(worker, *args)`."""
        assert self._worker is not None
        return task(self._worker, *args)


@dataclass(eq=False)
class _Member:
    """One actor; `building` until it can be given work, `load` is the number of its tasks under way."""

    actor: ray.actor.ActorHandle
    building: ray.ObjectRef | None
    load: int = 0


class _WorkerLost(Exception):
    """A task's worker, or the object that it left, is gone; the task can be repeated."""


class RayPool:
    """See Pool. Joins the Ray at `address` ("local": starts one, ended by `close`).

    A worker that is lost, with its process or its node, is replaced: the new one repeats the calls of `each` since
    `begin`, and what the lost one had been given is given out again. Tasks are pure: the results are the same. A task
    that loses its worker three times is an error.
    """

    def __init__(self, spec: WorkerSpec, *, address: str, replicas: int | None) -> None:
        self._started_ray = not ray.is_initialized()
        self._members: list[_Member] = []
        self._calls: list[_Call] = []
        _connect(address)
        try:
            self._start_actors(spec, replicas)
        except BaseException:
            self.close()
            raise

    @property
    def replicas(self) -> int:
        """Number of actors."""
        return len(self._members)

    def begin(self) -> None:
        """See Pool."""
        self._calls = []

    def map(self, task: Callable[..., Result], items: Sequence[Item], *shared: object) -> Iterator[Result]:
        """See Pool. At most two tasks per actor are under way; results that come early wait for their turn."""
        references = [ray.put(value) for value in shared]
        waiting = list(range(len(items)))  # a heap: repeated items come first
        losses: Counter[int] = Counter()
        flight: dict[ray.ObjectRef, tuple[int, _Member]] = {}
        done: dict[int, Result] = {}
        for turn in range(len(items)):
            while turn not in done:
                while waiting and (member := self._idlest()) is not None:
                    index = heappop(waiting)
                    flight[member.actor.call.remote(task, items[index], *references)] = (index, member)
                    member.load += 1
                ready = self._next(flight)
                if ready is None:
                    continue
                index, member = flight.pop(ready)
                member.load -= 1
                name = f"{task_name(task)}, item {index + 1} of {len(items)}"
                try:
                    done[index] = _result(ready, name)
                except _WorkerLost as lost:
                    losses[index] += 1
                    self._replace(member, f"{name}: {lost}", losses[index])
                    heappush(waiting, index)
            yield done.pop(turn)

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """See Pool."""
        references = tuple(ray.put(value) for value in shared)
        members = [self._built(member) for member in list(self._members)]
        calls = [member.actor.call.remote(task, *references) for member in members]
        results = []
        for number, (member, call) in enumerate(zip(members, calls, strict=True), start=1):
            results.append(self._repeated(task, references, member, call, f"{task_name(task)}, worker {number}"))
        self._calls = [call for call in self._calls if call[0] is not task] + [(task, references)]
        return results

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """See Pool."""
        references = tuple(ray.put(value) for value in args)
        member = self._built(self._members[0])
        return self._repeated(task, references, member, member.actor.call.remote(task, *references), task_name(task))

    def close(self) -> None:
        """Kill the actors and, if this pool started a Ray, end it."""
        for member in self._members:
            ray.kill(member.actor)
        self._members = []
        if self._started_ray:
            ray.shutdown()

    def _repeated(
        self,
        task: Callable[..., Result],
        references: tuple[ray.ObjectRef, ...],
        member: _Member,
        call: ray.ObjectRef,
        name: str,
    ) -> Result:
        """The result of `call`, made again on a new worker when its own is lost."""
        losses = 0
        while True:
            try:
                result: Result = _result(call, name)
            except _WorkerLost as lost:
                losses += 1
                member = self._built(self._replace(member, f"{name}: {lost}", losses))
                call = member.actor.call.remote(task, *references)
            else:
                return result

    def _idlest(self) -> _Member | None:
        """The worker to give a task to, None while all have enough."""
        able = [member for member in self._members if member.building is None and member.load < _IN_FLIGHT_PER_ACTOR]
        return min(able, key=lambda member: member.load, default=None)

    def _next(self, flight: Mapping[ray.ObjectRef, object]) -> ray.ObjectRef | None:
        """A task that is done; None when it was a worker that has become ready."""
        building = {member.building: member for member in self._members if member.building is not None}
        timeout = None if flight else _START_TIMEOUT_S
        ready, _ = ray.wait([*flight, *building], num_returns=1, timeout=timeout)
        if ready and ready[0] in flight:
            return ready[0]
        self._built(building[ready[0]] if ready else next(iter(building.values())))
        return None

    def _built(self, member: _Member) -> _Member:
        """`member`, or the one that replaces it, once it can be given work."""
        losses = 0
        while member.building is not None:
            name = f"start of worker {self._members.index(member) + 1}"
            try:
                _result(member.building, name, timeout=_START_TIMEOUT_S)
            except _WorkerLost as lost:
                losses += 1
                member = self._replace(member, f"{name}: {lost}", losses)
            else:
                member.building = None
        return member

    def _replace(self, member: _Member, what: str, losses: int) -> _Member:
        """A new worker in the place of a lost one, on its way to the others' state."""
        if losses >= _MOST_LOSSES:
            raise TaskError(f"{what}, {losses} times; was the node short of memory?")
        if member not in self._members:  # another of its tasks said so
            return self._members[0]
        logger.warning("%s; a new worker takes its place", what)
        place = self._members.index(member)
        with suppress(RayActorError):
            ray.kill(member.actor)
        self._members[place] = self._new_member()
        return self._members[place]

    def _new_member(self) -> _Member:
        actor = self._actor_class.remote()
        return _Member(actor, actor.build.remote(self._spec, list(self._calls)))

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
        self._spec = dataclasses.replace(spec, device="cuda" if on_gpu else "cpu", threads=threads)
        self._actor_class = ray.remote(_ReplicaActor).options(
            num_gpus=1 if on_gpu else 0,
            num_cpus=min(threads, num_cpus // count),
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_task_retries=0,
            allow_out_of_order_execution=True,
        )
        self._members = [self._new_member() for _ in range(count)]
        for member in list(self._members):
            self._built(member)


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
    """The value, or the error of the task said once: ValueError as it was, anything else as TaskError.

    _WorkerLost when there is nobody left to say it.
    """
    try:
        return ray.get(reference, timeout=timeout)
    except (RayActorError, ObjectLostError) as error:  # before RayTaskError: one that wraps it is both
        raise _WorkerLost(f"its worker died ({str(error).strip().splitlines()[0]})") from error
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise error.cause from None
        raise TaskError(f"{item} failed:\n{error}") from error
    except GetTimeoutError as error:
        free = ray.available_resources()
        raise TaskError(f"{item}: not ready after {timeout:.0f} s; free in the cluster: {free}") from error
