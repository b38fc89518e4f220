"""What goes on beside a worker's tasks, one call after the other, in a thread of its own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Calls by name; each is given an event that is set when nobody waits for it any more."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._calls: dict[str, Future[Result]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, name: str, call: Callable[[threading.Event], Result]) -> None:
        """Have `call` made after those before it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
        self._calls[name] = self._thread.submit(call, self._stop)

    def found(self, patience_s: float) -> dict[str, Result | None]:
        """What each call returned, None of one that has not after `patience_s`. Raises what one of them raised."""
        wait(self._calls.values(), timeout=patience_s)
        return {name: call.result() if call.done() else None for name, call in self._calls.items()}

    def end(self) -> None:
        """Forget all calls; returns when none is under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._stop, self._calls, self._thread = threading.Event(), {}, None
