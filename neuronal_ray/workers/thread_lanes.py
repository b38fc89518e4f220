"""Thread lanes: on a CPU, twins of a replica that share its weights and run tasks in parallel, a thread pool each.

Small operations do not keep several threads busy, and all threads wait between them. Candidates on lanes of their own
do not wait for each other.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import torch

from neuronal_ray.workers.masked_weights import MaskedWeights
from neuronal_ray.workers.replica import Replica

Item = TypeVar("Item")
Result = TypeVar("Result")

_MOST_LANES = 8
_MASKED_BYTES = 2**30
"""The most that the masked copies of a block take in all lanes together."""


def most_lanes(block_bytes: int) -> int:
    """Return the most lanes for a model whose largest block has linears of `block_bytes`."""
    return max(1, min(_MOST_LANES, _MASKED_BYTES // max(1, block_bytes)))


def lane_count(threads: int, block_bytes: int) -> int:
    """Return the number of lanes that `threads` are divided into, equally many for each lane."""
    return max(count for count in range(1, most_lanes(block_bytes) + 1) if threads % count == 0)


@dataclass(frozen=True, eq=False)
class Lane:
    """A replica and its masked weights, for one task at a time; `parallel` tasks run at the same time."""

    replica: Replica
    masked_weights: MaskedWeights
    parallel: int = 1


class ThreadLanes:
    """`count` twins of one replica, and the threads that run tasks on them."""

    def __init__(self, replica: Replica, count: int) -> None:
        self._replica, self._threads = replica, torch.get_num_threads()
        self._stop = threading.Event()
        self._twins = [replica.twin(self._stop) for _ in range(count)]
        self._free: queue.SimpleQueue[tuple[Replica, MaskedWeights]] = queue.SimpleQueue()
        for twin in self._twins:
            self._free.put((twin, MaskedWeights(twin)))
        self._pool = ThreadPoolExecutor(count, initializer=_begin_lane, initargs=(self._threads // count,))

    def map(self, call: Callable[[Lane, Item], Result], items: Sequence[Item]) -> list[Result]:
        """Return `call(lane, item)` for each item; after an error or an interrupt the other calls stop soon."""
        parallel = min(len(items), len(self._twins))

        def run(item: Item) -> Result:
            replica, masked_weights = self._free.get()
            try:
                return call(Lane(replica, masked_weights, parallel), item)
            finally:
                self._free.put((replica, masked_weights))

        futures = [self._pool.submit(run, item) for item in items]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in ended:
                future.result()  # raises the error, if there is one
            return [future.result() for future in futures]
        except BaseException:
            self._stop.set()
            raise
        finally:
            for future in futures:
                future.cancel()
            wait(futures)
            self._stop.clear()
            torch.set_num_threads(self._threads)  # a lane also sets the default of threads that start later
            self._count(parallel)

    def _count(self, parallel: int) -> None:
        """Add the twins' tokens to the replica's, and the time of one lane to its stopwatch."""
        for twin in self._twins:
            self._replica.tokens += twin.tokens
            twin.tokens = 0
            for name, seconds in twin.stopwatch.seconds.items():
                self._replica.stopwatch.seconds[name] += seconds / parallel
            twin.stopwatch.seconds.clear()


def _begin_lane(threads: int) -> None:
    """Set a lane's number of threads; a thread that never reads it would take the number last set elsewhere."""
    torch.get_num_threads()
    torch.set_num_threads(threads)
