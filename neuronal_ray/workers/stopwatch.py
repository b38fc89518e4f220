"""Where a worker's time goes: seconds per activity, without the time of activities nested in it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Exclusive wall-clock seconds by name; with `synchronize`, each change waits for the device (for benchmarks)."""

    def __init__(self, device: torch.device, *, synchronize: bool) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.synchronize = synchronize and device.type == "cuda"
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Count the time of the body under `name`, except what it measures under other names."""
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        if self.synchronize:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now
