"""From packed.c to functions: compiled on first use by the system's compiler, kept under the user's cache directory."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

_SOURCE = Path(__file__).with_name("packed.c")
_INSTRUCTIONS = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2", "-mavx512bf16")
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", "-mpopcnt", *_INSTRUCTIONS)


class KernelUnavailable(RuntimeError):
    """No compiler, or a processor without the instructions; the message says which."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions of packed.c.

    To be called after torch was imported, whose OpenMP they then share. Raises KernelUnavailable.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelUnavailable(f"the packed kernel is for Linux on x86-64, this is {platform.platform(terse=True)}")
    found = [shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")]
    compiler = next((path for path in found if path is not None), None)
    if compiler is None:
        raise KernelUnavailable("the packed kernel needs a C compiler: install gcc or set CC")
    file = _cache() / f"packed-{_digest(compiler)}.so"
    if not file.is_file():
        _compile(compiler, file)
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as error:
        raise KernelUnavailable(f"the packed kernel cannot be loaded: {error}") from error
    if not loaded.packed_supported():
        raise KernelUnavailable("the packed kernel needs a processor with AVX-512 VBMI2 and AVX-512 BF16")
    return loaded


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuronal_ray"


def _digest(compiler: str) -> str:
    """Another source, compiler or set of flags is another file."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    return hashlib.sha256(_SOURCE.read_bytes() + version + " ".join(_FLAGS).encode()).hexdigest()[:16]


def _compile(compiler: str, file: Path) -> None:
    """Write `file`, whole or not at all."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            command = [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise KernelUnavailable(f"{compiler} cannot compile the packed kernel: {reason}")
            made.replace(file)
    except OSError as error:
        raise KernelUnavailable(f"the packed kernel cannot be written to {file.parent}: {error.strerror}") from error
