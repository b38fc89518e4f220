"""The pool on Ray: replicas are chains of actors, tasks pass along by reference, lost workers are replaced."""

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from heapq import heappop, heappush
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.util import metrics

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.footprint import Devices, Fit
from neuronal_ray.workers.pools.protocol import ResourceError
from neuronal_ray.workers.pools.ray.actor import Call
from neuronal_ray.workers.pools.ray.chain import Chain, WorkerLost, new_call, new_chain, result_of
from neuronal_ray.workers.pools.ray.devices import connect, find_devices
from neuronal_ray.workers.pools.ray.gpus import check_distinct, gpu_identity
from neuronal_ray.workers.pools.ray.tensors import send_bytes_of_tensors
from neuronal_ray.workers.shard import Handover, task_name
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.statistics import keep_layout, trace
from neuronal_ray.workers.worker import Worker

logger = logging.getLogger(__name__)

P = ParamSpec("P")
Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_LOSSES = 3
_START_TIMEOUT_S, _LEAST_START_TIMEOUT_S = 1800.0, 120.0


class RayPool:
    """See Pool. Joins the Ray at `address` ("local": starts one, ended by `close`).

    A chain that loses an actor, with its process or its node, or whose task takes longer than `task_timeout_s`, is
    replaced. The new chain repeats the calls of `each` since `begin`; the tasks of the lost one are given out again.
    Tasks are pure: the results are the same. A task that loses its chain three times is an error. Where there is no
    room for a new chain, the others go on without it until there is.
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
        """`choose` returns shards and replicas for the cluster's devices; without it those given are used."""
        self._started_ray = not ray.is_initialized()
        self._chains: list[Chain] = []
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
                spec = dataclasses.replace(spec, shards=chosen.shards, offload=chosen.offload)
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
        self._calls = [call for call in self._calls if call.task is keep_layout]

    def map(
        self,
        task: Callable[Concatenate[Worker, Item, P], Result],
        items: Iterable[Item],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Iterator[Result]:
        """See Pool. A chain has one task more under way than shards; results that come early wait for their turn."""
        call = new_call(task, args, kwargs)
        total = f" of {len(items)}" if isinstance(items, Sized) else ""
        remaining, turn = enumerate(items), 0
        given: dict[int, Item] = {}  # not done yet
        again: list[int] = []  # a heap of those whose worker was lost: they come first
        losses: Counter[int] = Counter()
        flight: dict[ray.ObjectRef, tuple[int, Chain]] = {}
        done: dict[int, Result] = {}
        try:
            while True:
                while (chain := self._idlest()) is not None:
                    if again:
                        index = heappop(again)
                    elif (following := next(remaining, None)) is not None:
                        index, item = following
                        given[index] = item
                    else:
                        break
                    flight[chain.call(call, given[index])[-1]] = (index, chain)
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
                    done[index] = result_of(ready, name)
                    del given[index]
                except WorkerLost as lost:
                    losses[index] += 1
                    self._replace(chain, f"{name}: {lost}", losses[index])
                    heappush(again, index)
        finally:  # left half-way: nobody waits for what is under way
            for _, chain in flight.values():
                chain.load -= 1

    def each(
        self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """See Pool."""
        results = self.each_also(task, *args, **kwargs)
        self._calls = [call for call in self._calls[:-1] if call.task is not task] + self._calls[-1:]
        return results

    def each_also(
        self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[Result]:
        """See Pool."""
        call = new_call(task, args, kwargs)
        able = self._able()
        for chain in self._chains:
            if chain not in able:
                chain.missed.append(call)
        begun = [(chain, chain.call(call)) for chain in able]
        results: list[Any] = []
        for number, (chain, references) in enumerate(begun, start=1):
            results += self._results(call, chain, references, f"{task_name(task)}, worker {number}", others_do=True)
        self._calls.append(call)
        return [result for result in results if not isinstance(result, Handover)]

    def first(self, task: Callable[Concatenate[Worker, P], Result], /, *args: P.args, **kwargs: P.kwargs) -> Result:
        """See Pool."""
        call, chain = new_call(task, args, kwargs), self._able()[0]
        result: Result = self._results(call, chain, chain.call(call)[-1:], task_name(task))[-1]
        return result

    def close(self) -> None:
        """Kill the actors and, if this pool started a Ray, end it."""
        for chain in self._chains:
            chain.end()
        self._chains = []
        if self._started_ray:
            ray.shutdown()

    def _results(
        self, call: Call, chain: Chain, references: list[ray.ObjectRef], name: str, *, others_do: bool = False
    ) -> list[Any]:
        """Return the results of a call, made again on another chain when its own is lost.

        `others_do`: all chains make the call. A new chain makes it when it is built, and it is not waited for if there
        are others.
        """
        losses, count = 0, len(references)
        while True:
            try:
                return [result_of(reference, name, timeout=self._task_timeout_s) for reference in references]
            except WorkerLost as lost:
                losses += 1
                chain = self._replace(chain, f"{name}: {lost}", losses)
                if others_do and any(other.building is None for other in self._chains if other is not chain):
                    chain.missed.append(call)
                    return []
                chain = self._built(chain) if others_do else self._able()[0]
                references = chain.call(call)[-count:]

    def _able(self) -> list[Chain]:
        """Return the chains that tasks can be given to; wait for one when there is none."""
        building = {chain.building: chain for chain in self._chains if chain.building is not None}
        if building:
            wait = 0.0 if len(building) < len(self._chains) else self._start_timeout_s
            ready, _ = ray.wait(list(building), num_returns=1, timeout=wait)
            for reference in ready:
                self._begun(building[reference])
        able = [chain for chain in self._chains if chain.building is None]
        return able or [self._built(self._chains[0])]

    def _idlest(self) -> Chain | None:
        """Return the chain to give a task to, None while all have enough."""
        able = [chain for chain in self._chains if chain.building is None and chain.load <= self.shards]
        return min(able, key=lambda chain: chain.load, default=None)

    def _next(self, flight: Mapping[ray.ObjectRef, tuple[int, Chain]]) -> ray.ObjectRef | None:
        """Return a task that is done; None when a chain has become ready, or hangs."""
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

    def _built(self, chain: Chain) -> Chain:
        """Return `chain`, or the one that replaces it, once tasks can be given to it."""
        while chain.building is not None:
            chain = self._begun(chain)
        return chain

    def _begun(self, chain: Chain) -> Chain:
        """Return `chain` once it is built and has made the calls it missed; else its replacement, not built yet."""
        name = f"start of replica {self._chains.index(chain) + 1}"
        try:
            result_of(chain.building, name, timeout=self._start_timeout_s)
            for call in chain.missed:
                for reference in chain.call(call):
                    result_of(reference, task_name(call.task), timeout=self._task_timeout_s)
        except WorkerLost as lost:
            failures = chain.failures + 1
            chain = self._replace(chain, f"{name}: {lost}", failures)
            chain.failures = failures
        else:
            chain.building, chain.missed = None, []
        return chain

    def _replace(self, chain: Chain, what: str, losses: int) -> Chain:
        """Return a new chain in the place of a lost one, on its way to the state of the others."""
        self._retries.inc()
        if losses >= _MOST_LOSSES:
            raise ResourceError(f"{what}, {losses} times; was the node short of memory?")
        if chain not in self._chains:  # replaced already, for another of its tasks
            return self._chains[0]
        logger.warning("%s; a new worker takes its place", what)
        place = self._chains.index(chain)
        chain.end()
        self._chains[place] = self._new_chain()
        return self._chains[place]

    def _new_chain(self) -> Chain:
        return new_chain(self._spec, self._needs, self._calls)

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
        if on_gpu:
            check_distinct(self.each(gpu_identity), shared=per_gpu > 1)
            self.begin()
        if spec.shards > 1:
            self.each(keep_layout, self.first(trace))
