"""Calls that run in the background of a worker's tasks: one after the other, in a thread of their own."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Background(Generic[Result]):
    """Calls by name; each receives an event that is set when its result is no longer wanted."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._calls: dict[str, Future[Result]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, name: str, call: Callable[[threading.Event], Result]) -> None:
        """Queue `call` behind the calls before it."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1)
        self._calls[name] = self._thread.submit(call, self._stop)

    def results(self, patience_s: float) -> dict[str, Result | None]:
        """Return the result of each call, None for one that is not done after `patience_s`; raise a call's error."""
        wait(self._calls.values(), timeout=patience_s)
        return {name: call.result() if call.done() else None for name, call in self._calls.items()}

    def end(self) -> None:
        """Forget all calls; return when none is running."""
        self._stop.set()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
        self._stop, self._calls, self._thread = threading.Event(), {}, None
