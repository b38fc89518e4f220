"""The ceilings of a device (products and copies), which other figures are compared with; its time and peak memory."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from neuronal_ray.cli.memory import reset_peak

_ROUNDS = 7


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """Operations per second of a large matrix product; bytes per second, read plus written, of a large copy."""

    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return f"{format_flops(self.flops)} (matrix product), {self.bandwidth / 1e9:.3g} GB/s (copy, read + written)"


def format_flops(rate: float) -> str:
    """Format operations per second in a suitable unit."""
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Return the best of several runs after a warm-up, on random numbers: zeros can be faster than data."""
    on_gpu = device.type == "cuda"
    size, numbers = (8192, 2**30) if on_gpu else (2048, 2**26)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    product_s = _best(device, lambda: torch.mm(left, right, out=product))
    source = torch.randint(-(2**15), 2**15, (numbers,), device=device, dtype=torch.int16, generator=generator)
    target = torch.ones_like(source)
    copy_s = _best(device, lambda: target.copy_(source))
    return Ceilings(flops=2 * size**3 / product_s, bandwidth=2 * source.nbytes / copy_s)


def _best(device: torch.device, call: Callable[[], object]) -> float:
    call()
    return min(seconds(device, call) for _ in range(_ROUNDS))


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Return the seconds until the device is done with `call`."""
    settle(device)
    begin = time.perf_counter()
    call()
    settle(device)
    return time.perf_counter() - begin


def settle(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget_peak(device: torch.device) -> None:
    """Count the peaks of the device and of this process from now on."""
    if device.type == "cuda":
        torch.cuda.init()  # counting needs it
        torch.cuda.reset_peak_memory_stats(device)
    reset_peak()


def device_peak(device: torch.device) -> int | None:
    """Return the most bytes that were allocated on a GPU; None for the host, whose peak is `cli.memory.peak_bytes`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
