"""Memory for large tensors on a CPU: kept when it is freed, since taking it anew costs more than what is done in it; or
given back, where much was freed for good."""

import ctypes
import sys
from collections.abc import Callable

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # malloc.h
_KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Have the C library hand freed memory out again, up to 2 GiB, in place of returning it at once; for this process.

    glibc maps every large block anew and unmaps it when it is freed: the kernel then clears its pages at first touch,
    again and again. Elsewhere nothing is done.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Have the C library give memory that is free now back to the system."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None elsewhere, musl included."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
