"""The first use of compiled kernels: tried once, and replaced by torch's own operations where it fails."""

import functools
import logging
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def tried_once(title: str) -> Callable[[Callable[..., Result]], Callable[..., Result | None]]:
    """Decorate a function that makes kernels ready: where it raises, warn with the reason and return None.

    It runs once for each value of its arguments, in one thread while others wait, so that the warning is one.
    Whatever is wrong with a compiler, a driver or a processor, torch computes the same without the kernels.
    """

    def decorate(make_ready: Callable[..., Result]) -> Callable[..., Result | None]:
        lock = threading.Lock()

        @functools.cache
        def found(*arguments: Hashable) -> Result | None:
            try:
                return make_ready(*arguments)
            except Exception as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logger.warning("%s: %s; torch's own operations are used, which take longer", title, reason)
                return None

        @functools.wraps(make_ready)
        def waited_for(*arguments: Hashable) -> Result | None:
            with lock:
                return found(*arguments)

        return waited_for

    return decorate
