"""Lanes: twins of a replica on a CPU, which share its weights and are passed side by side, each by its own thread.

Small operations do not keep several threads busy, and between them everyone waits; candidates that go side by side do
not wait for each other.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from neuronal_ray.workers.masked_weights import Cuts
from neuronal_ray.workers.replica import Replica

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST = 8
_CUT_BYTES = 2**30
"""All lanes' copies of a block take no more."""


def most_lanes(block_bytes: int) -> int:
    """How many a model may have whose largest block's linears have `block_bytes`."""
    return max(1, min(_MOST, _CUT_BYTES // max(1, block_bytes)))


def lane_count(threads: int, block_bytes: int) -> int:
    """How many lanes `threads` make of it, with equally many in each."""
    return max(count for count in range(1, most_lanes(block_bytes) + 1) if threads % count == 0)


@dataclass(frozen=True, eq=False)
class Lane:
    """A replica and the memory of its cuts, for one task at a time; `beside` are under way with it, itself included."""

    replica: Replica
    cuts: Cuts
    beside: int = 1


class Lanes:
    """`count` twins of one replica, and the threads that pass them."""

    def __init__(self, replica: Replica, count: int) -> None:
        self._replica, self._threads = replica, torch.get_num_threads()
        self._stop = threading.Event()
        self._twins = [replica.twin(self._stop) for _ in range(count)]
        self._free: queue.SimpleQueue[tuple[Replica, Cuts]] = queue.SimpleQueue()
        for twin in self._twins:
            self._free.put((twin, Cuts(twin)))
        self._pool = ThreadPoolExecutor(count, initializer=_begin, initargs=(self._threads // count,))

    def map(self, call: Callable[[Lane, Item], Result], items: Sequence[Item]) -> list[Result]:
        """`call(lane, item)` for each item. After an error of one of them, or an interrupt, the others stop soon."""
        beside = min(len(items), len(self._twins))

        def run(item: Item) -> Result:
            replica, cuts = self._free.get()
            try:
                return call(Lane(replica, cuts, beside), item)
            finally:
                self._free.put((replica, cuts))

        futures = [self._pool.submit(run, item) for item in items]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()  # an error, if there is one
            return [future.result() for future in futures]
        except BaseException:
            self._stop.set()
            raise
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
            self._stop.clear()
            torch.set_num_threads(self._threads)  # a lane sets the default of threads to come besides its own
            self._count(beside)

    def _count(self, beside: int) -> None:
        """What passed the twins passed the replica: its seconds are those of one of those side by side."""
        for twin in self._twins:
            self._replica.tokens += twin.tokens
            twin.tokens = 0
            for name, seconds in twin.stopwatch.seconds.items():
                self._replica.stopwatch.seconds[name] += seconds / beside
            twin.stopwatch.seconds.clear()


def _begin(threads: int) -> None:
    """Of a lane's thread. One that was never asked would take the number that others were given last."""
    torch.get_num_threads()
    torch.set_num_threads(threads)
