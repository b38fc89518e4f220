"""Freed memory of large CPU tensors: kept by the C library for reuse, or returned to the system."""

import ctypes
import sys
from collections.abc import Callable

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # malloc.h
_KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc keep up to 2 GiB of this process's freed memory for reuse; do nothing with another C library.

    By default glibc maps each large block anew and unmaps it when freed, and the system clears all its pages each time,
    which takes longer than most work on the tensors.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def return_freed_memory() -> None:
    """Let glibc return memory that is free now to the system; do nothing with another C library."""
    trim = _of_glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc, None where the C library lacks it (musl included)."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), name, None)
