"""Freed memory is reused rather than mapped anew."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from neuronal_ray.core.kernels.freed_memory import keep_freed_memory
if {keep}:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
before = faults()
for _ in range(8):
    torch.ones(2**24)
print(faults() - before)
"""


def faults(keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", SCRIPT.format(keep=keep)], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_large_tensors_reuse_pages() -> None:
    pages = 2**24 * 4 // 4096
    usual = faults(False)
    if usual < pages:
        pytest.skip(f"this C library, or huge pages, spares the faults by itself: {usual}")
    kept = faults(True)
    assert kept < usual // 4, (usual, kept)
