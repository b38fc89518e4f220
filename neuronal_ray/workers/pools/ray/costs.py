"""What a call through Ray costs, and how fast a result gets from one actor to another, measured."""

import time
from dataclasses import dataclass

import ray
import torch
from torch import Tensor

from neuronal_ray.workers.pools.ray.tensors import send_bytes_of_tensors

_HANDOVER_BYTES = 16 * 2**20  # about the hidden states of a candidate's chunk
_CALLS, _TIMES = 200, 5


@dataclass(frozen=True, kw_only=True)
class RayCosts:
    """Seconds of a call and its result; bytes per second from actor to actor."""

    call_s: float
    handed_rate: float


class _Holder:
    """An actor that hands a tensor on, or takes one."""

    def __init__(self) -> None:
        send_bytes_of_tensors()

    def give(self, size: int) -> Tensor:
        """Return a tensor of `size` bytes."""
        return torch.ones(size, dtype=torch.uint8)

    def take(self, tensor: Tensor) -> int:
        """Read a byte of every page, so that all of the tensor has arrived."""
        return int(tensor[:: 2**12].sum())

    def nothing(self) -> None:
        """Do nothing."""


def measure_ray_costs() -> RayCosts:
    """Measure on the Ray that this process has joined; the rate is the best of several."""
    one, other = (ray.remote(_Holder).remote() for _ in range(2))
    ray.get([one.nothing.remote(), other.nothing.remote()])
    begin = time.perf_counter()
    for _ in range(_CALLS):
        ray.get(one.nothing.remote())
    call_s = (time.perf_counter() - begin) / _CALLS
    rates = []
    for _ in range(_TIMES):
        begin = time.perf_counter()
        ray.get(other.take.remote(one.give.remote(_HANDOVER_BYTES)))
        rates.append(_HANDOVER_BYTES / (time.perf_counter() - begin))
    for actor in (one, other):
        ray.kill(actor)
    return RayCosts(call_s=call_s, handed_rate=max(rates))
