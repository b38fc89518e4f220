"""The memory of this process and of this machine on Linux, in bytes."""

import os
import resource
from contextlib import suppress
from pathlib import Path

_STATUS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Return what this process has in memory now."""
    return _status("VmRSS") or 0


def private_bytes() -> int:
    """Return what this process has in memory now and shares neither with other processes nor with files."""
    return _status("RssAnon") or 0


def peak_bytes() -> int:
    """Return the most that this process had in memory since it began, or since `reset_peak`."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak() -> None:
    """Count the peak from now on, if the system allows it."""
    with suppress(OSError):
        _CLEAR_PEAK.write_text("5")


def machine_bytes() -> int:
    """Return the memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _status(field: str) -> int | None:
    """Return a line of /proc/self/status in bytes; None where the system has no such line."""
    with suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    return None
