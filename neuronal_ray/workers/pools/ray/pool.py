"""The Ray pool: replicas are chains of actors that hold the shards of the model; tasks pass along by reference."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, TypeVar

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util import metrics
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.footprint import Devices, Fit
from neuronal_ray.workers.pools.protocol import ResourceError, TaskError, task_name
from neuronal_ray.workers.pools.ray.actor import Call, ShardActor
from neuronal_ray.workers.pools.ray.devices import connect, find_devices
from neuronal_ray.workers.pools.ray.tensors import send_bytes_of_tensors
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.worker import Worker

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

_LOSSES = (RayActorError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)
_NO_RETRIES = {"max_restarts": 0, "max_task_retries": 0, "allow_out_of_order_execution": True}  # the pool retries
_MOST_LOSSES = 3
_START_TIMEOUT_S, _LEAST_START_TIMEOUT_S = 1800.0, 120.0


@dataclass(eq=False)
class _Chain:
    """The actors of one replica, first blocks first; `building` until it can be given work.

    `missed` are the calls of `each` since it was begun, `failures` how many before it were lost while they were built,
    `load` is the number of its tasks under way, `since` when it last began or ended one.
    """

    actors: list[ray.actor.ActorHandle]
    group: PlacementGroup | None
    building: ray.ObjectRef | None
    missed: list[Call] = field(default_factory=list)
    failures: int = 0
    load: int = 0
    since: float = field(default_factory=time.monotonic)

    def call(self, task: Callable[..., object], *args: object) -> list[ray.ObjectRef]:
        """What each shard will return; the driver never sees what one hands to the next."""
        references: list[ray.ObjectRef] = []
        for actor in self.actors:
            handed = references[-1] if references else None
            references.append(actor.call.remote(handed, task, *args))
        return references

    def end(self) -> None:
        """Kill the actors and give their places back."""
        for actor in self.actors:
            with suppress(RayActorError):
                ray.kill(actor)
        if self.group is not None:
            remove_placement_group(self.group)


class _WorkerLost(Exception):
    """A task's worker, or the object that it left, is gone; the task can be repeated."""


class RayPool:
    """See Pool. Joins the Ray at `address` ("local": starts one, ended by `close`).

    A chain that loses an actor, with its process or its node, or whose task takes longer than `task_timeout_s`, is
    replaced: the new one repeats the calls of `each` since `begin`, and what the lost one had been given is given out
    again. Tasks are pure: the results are the same. A task that loses its chain three times is an error. Where there is
    no room for a new one the others go on without it until there is.
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        address: str,
        replicas: int | None = None,
        choose: Callable[[Devices], Fit] | None = None,
        task_timeout_s: float = 7200.0,
    ) -> None:
        """`choose` says into how many shards and replicas, once the cluster's devices are known; else those given."""
        self._started_ray = not ray.is_initialized()
        self._chains: list[_Chain] = []
        self._calls: list[Call] = []
        self._task_timeout_s = task_timeout_s
        self._start_timeout_s = min(max(task_timeout_s, _LEAST_START_TIMEOUT_S), _START_TIMEOUT_S)
        connect(address)
        send_bytes_of_tensors()
        self._retries = metrics.Counter("neuronal_ray_retries", "Tasks repeated because their worker was lost.", ())
        try:
            if choose is not None:
                chosen = choose(find_devices(spec.device))
                logger.info("workers: %s", chosen)
                spec = dataclasses.replace(spec, shards=chosen.shards, streams=chosen.streams)
                replicas = chosen.replicas
            self._start_chains(spec, replicas)
        except BaseException:
            self.close()
            raise

    @property
    def replicas(self) -> int:
        """Number of chains."""
        return len(self._chains)

    @property
    def shards(self) -> int:
        """See Pool."""
        return self._spec.shards

    def begin(self) -> None:
        """See Pool."""
        self._calls = [call for call in self._calls if call[0] is Worker.keep_layout]

    def map(self, task: Callable[..., Result], items: Iterable[Item], *shared: object) -> Iterator[Result]:
        """See Pool. A chain has one task more under way than shards; results that come early wait for their turn.

        An item is asked for when a chain can take it.
        """
        references = [ray.put(value) for value in shared]
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        coming, turn = enumerate(items), 0
        given: dict[int, Item] = {}  # not done yet
        again: list[int] = []  # a heap of those whose worker was lost: they come first
        losses: Counter[int] = Counter()
        flight: dict[ray.ObjectRef, tuple[int, _Chain]] = {}
        done: dict[int, Result] = {}
        try:
            while True:
                while (chain := self._idlest()) is not None:
                    if again:
                        index = heappop(again)
                    elif (one := next(coming, None)) is not None:
                        index, item = one
                        given[index] = item
                    else:
                        break
                    flight[chain.call(task, given[index], *references)[-1]] = (index, chain)
                    chain.since = time.monotonic() if not chain.load else chain.since
                    chain.load += 1
                while turn in done:
                    yield done.pop(turn)
                    turn += 1
                if not flight and not again and chain is not None:
                    return
                ready = self._next(flight)
                if ready is None:
                    continue
                index, chain = flight.pop(ready)
                chain.load -= 1
                chain.since = time.monotonic()
                name = f"{task_name(task)}, item {index + 1}{total}"
                try:
                    done[index] = _result(ready, name)
                    del given[index]
                except _WorkerLost as lost:
                    losses[index] += 1
                    self._replace(chain, f"{name}: {lost}", losses[index])
                    heappush(again, index)
        finally:  # left half-way: nobody waits for what is under way
            for _, chain in flight.values():
                chain.load -= 1

    def each(self, task: Callable[..., Result], *shared: object) -> list[Result]:
        """See Pool."""
        references = tuple(ray.put(value) for value in shared)
        able = self._able()
        for chain in self._chains:
            if chain not in able:
                chain.missed.append((task, references))
        calls = [(chain, chain.call(task, *references)) for chain in able]
        results: list[Result] = []
        for number, (chain, call) in enumerate(calls, start=1):
            name = f"{task_name(task)}, worker {number}"
            results += self._repeated(task, references, chain, call, name, others_do=True)
        self._calls = [call for call in self._calls if call[0] is not task] + [(task, references)]
        return results

    def first(self, task: Callable[..., Result], *args: object) -> Result:
        """See Pool."""
        references = tuple(ray.put(value) for value in args)
        chain = self._able()[0]
        return self._repeated(task, references, chain, chain.call(task, *references)[-1:], task_name(task))[-1]

    def close(self) -> None:
        """Kill the actors and, if this pool started a Ray, end it."""
        for chain in self._chains:
            chain.end()
        self._chains = []
        if self._started_ray:
            ray.shutdown()

    def _repeated(
        self,
        task: Callable[..., Result],
        references: tuple[ray.ObjectRef, ...],
        chain: _Chain,
        call: list[ray.ObjectRef],
        name: str,
        *,
        others_do: bool = False,
    ) -> list[Result]:
        """The results of `call`, made again on another chain when its own is lost.

        `others_do`: all chains make it; a new one does when it is built, and nobody waits for it if there are others.
        """
        losses, wanted = 0, len(call)
        while True:
            try:
                return [_result(one, name, timeout=self._task_timeout_s) for one in call]
            except _WorkerLost as lost:
                losses += 1
                chain = self._replace(chain, f"{name}: {lost}", losses)
                if others_do and any(other.building is None for other in self._chains if other is not chain):
                    chain.missed.append((task, references))
                    return []
                chain = self._built(chain) if others_do else self._able()[0]
                call = chain.call(task, *references)[-wanted:]

    def _able(self) -> list[_Chain]:
        """The chains that can be given work; waits for one when there is none."""
        building = {chain.building: chain for chain in self._chains if chain.building is not None}
        if building:
            wait = 0.0 if len(building) < len(self._chains) else self._start_timeout_s
            ready, _ = ray.wait(list(building), num_returns=1, timeout=wait)
            for reference in ready:
                self._begun(building[reference])
        able = [chain for chain in self._chains if chain.building is None]
        return able or [self._built(self._chains[0])]

    def _idlest(self) -> _Chain | None:
        """The chain to give a task to, None while all have enough."""
        able = [chain for chain in self._chains if chain.building is None and chain.load <= self.shards]
        return min(able, key=lambda chain: chain.load, default=None)

    def _next(self, flight: Mapping[ray.ObjectRef, tuple[int, _Chain]]) -> ray.ObjectRef | None:
        """A task that is done; None when something else happened: a chain has become ready, or hangs."""
        building = {chain.building: chain for chain in self._chains if chain.building is not None}
        oldest = min((chain for _, chain in flight.values()), key=lambda chain: chain.since, default=None)
        timeout = self._start_timeout_s
        if oldest is not None:
            timeout = max(0.0, oldest.since + self._task_timeout_s - time.monotonic())
        ready, _ = ray.wait([*flight, *building], num_returns=1, timeout=timeout)
        if ready and ready[0] in flight:
            return ready[0]
        if not ready and oldest is not None:
            logger.warning("a task is not done after %.0f s; its worker is ended", self._task_timeout_s)
            oldest.since = time.monotonic()
            oldest.end()
            return None
        self._begun(building[ready[0]] if ready else next(iter(building.values())))
        return None

    def _built(self, chain: _Chain) -> _Chain:
        """`chain`, or the one that replaces it, once it can be given work."""
        while chain.building is not None:
            chain = self._begun(chain)
        return chain

    def _begun(self, chain: _Chain) -> _Chain:
        """`chain` once it is built and has made the calls that it missed; else the one in its place, not built yet."""
        name = f"start of replica {self._chains.index(chain) + 1}"
        try:
            _result(chain.building, name, timeout=self._start_timeout_s)
            for task, references in chain.missed:
                for one in chain.call(task, *references):
                    _result(one, task_name(task), timeout=self._task_timeout_s)
        except _WorkerLost as lost:
            failures = chain.failures + 1
            chain = self._replace(chain, f"{name}: {lost}", failures)
            chain.failures = failures
        else:
            chain.building, chain.missed = None, []
        return chain

    def _replace(self, chain: _Chain, what: str, losses: int) -> _Chain:
        """A new chain in the place of a lost one, on its way to the others' state."""
        self._retries.inc()
        if losses >= _MOST_LOSSES:
            raise ResourceError(f"{what}, {losses} times; was the node short of memory?")
        if chain not in self._chains:  # another of its tasks said so
            return self._chains[0]
        logger.warning("%s; a new worker takes its place", what)
        place = self._chains.index(chain)
        chain.end()
        self._chains[place] = self._new_chain()
        return self._chains[place]

    def _new_chain(self) -> _Chain:
        group = None
        if self.shards > 1:
            bundles = [{"CPU": self._needs["num_cpus"], "GPU": self._needs["num_gpus"]} for _ in range(self.shards)]
            bundles = [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]
            group = placement_group(bundles, strategy="PACK")  # one node if there is room, else few
        actors = []
        for shard in range(self.shards):
            strategy: object = "SPREAD"
            if group is not None:
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=shard)
            options = self._needs | {"scheduling_strategy": strategy}
            actors.append(ray.remote(ShardActor).options(**options, **_NO_RETRIES).remote())
        built = [
            actor.build.remote(dataclasses.replace(self._spec, shard=shard), actors[:shard])
            for shard, actor in enumerate(actors)
        ]
        handed = None
        for actor, one in zip(actors, built, strict=True):
            handed = actor.repeat.remote(handed, list(self._calls), one)
        return _Chain(actors, group, handed)

    def _start_chains(self, spec: WorkerSpec, replicas: int | None) -> None:
        resources = ray.cluster_resources()
        num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        on_gpu = spec.device == "cuda" or (spec.device == "auto" and num_gpus > 0)
        nodes = sum(node["Alive"] for node in ray.nodes())
        count = replicas or max(1, (num_gpus if on_gpu else nodes) // spec.shards)
        workers = count * spec.shards
        if on_gpu and not num_gpus:
            raise BadInput(f"--replicas: {workers} workers need {workers} GPUs, the Ray cluster has none")
        if workers > num_cpus:
            raise BadInput(f"--replicas: {workers} workers need {workers} CPUs, the Ray cluster has {num_cpus}")
        threads = spec.threads or max(1, num_cpus // workers)
        self._spec = dataclasses.replace(spec, device="cuda" if on_gpu else "cpu", threads=threads)
        per_gpu = -(-workers // num_gpus) if on_gpu else 0  # more workers than GPUs share them
        self._needs = {"num_gpus": 1 / per_gpu if per_gpu else 0, "num_cpus": min(threads, num_cpus // workers)}
        self._chains = [self._new_chain() for _ in range(count)]
        for chain in list(self._chains):
            self._built(chain)
        if spec.shards > 1:
            self.each(Worker.keep_layout, self.first(Worker.trace))


def _result(reference: ray.ObjectRef, item: str, *, timeout: float | None = None) -> Any:
    """Return the task's value; raise its BadInput as it was, any other error of it as TaskError from Ray's own error,
    which has the remote traceback.

    _WorkerLost when there is nobody left to say it, or when it was not said in time.
    """
    try:
        return ray.get(reference, timeout=timeout)
    except _LOSSES as error:  # before RayTaskError: one that wraps it is both
        raise _WorkerLost(f"its worker died ({str(error).strip().splitlines()[0]})") from error
    except RayTaskError as error:
        cause = error.cause
        while isinstance(cause, RayTaskError):  # of a shard that a later one waited for
            cause = cause.cause
        if isinstance(cause, BadInput):
            raise cause from None
        if isinstance(cause, OSError):  # a full disk, say: where in the code is no help
            raise ResourceError(f"{item}: {cause}") from error
        raise TaskError(f"{item} failed: {type(cause).__name__}: {cause}") from error
    except GetTimeoutError as error:
        free = {name: amount for name, amount in ray.available_resources().items() if name in ("CPU", "GPU")}
        raise _WorkerLost(f"not done after {timeout:.0f} s, free in the cluster: {free}") from error
