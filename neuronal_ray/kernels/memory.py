"""Memory for large tensors on a CPU: kept when it is freed, since taking it anew costs more than what is done in it."""

import ctypes
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # malloc.h
_KEPT_BYTES = 2**31 - 1


def keep_freed_memory() -> None:
    """Have the C library hand freed memory out again, up to 2 GiB, in place of returning it at once; for this process.

    glibc maps every large block anew and unmaps it when it is freed: the kernel then clears its pages at first touch,
    again and again. Elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
