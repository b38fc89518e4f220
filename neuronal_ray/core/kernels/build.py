"""The C kernels: compiled on first use by the system's compiler, and cached in the user's cache directory.

Load them after importing torch, so that they share its OpenMP.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from neuronal_ray.core.kernels.trial import tried_once

_EVERYWHERE = ("-O3", "-fopenmp", "-shared", "-fPIC")


@dataclass(frozen=True)
class _Source:
    """A C file in this directory; `functions` holds the argument types of its functions that return nothing."""

    name: str
    flags: tuple[str, ...]
    title: str
    functions: Mapping[str, tuple[type, ...]]

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(f"{self.name}.c")


_POINTER, _LENGTH, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_LINEAR = (*[_POINTER] * 5, _LENGTH, _LENGTH, _COUNT, _COUNT)
_UNPACK = _ZERO_LOWEST = (*[_POINTER] * 4, _LENGTH, _LENGTH, _COUNT)
_SQUARES = (_POINTER, _LENGTH, _LENGTH, _POINTER, _COUNT)
_PACKED = _Source(
    "packed_rows",
    ("-mpopcnt", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2", "-mavx512bf16"),
    "the packed kernel",
    {f"packed_linear_{kind}": _LINEAR for kind in ("bf16", "f32")}
    | {f"packed_unpack_{kind}": _UNPACK for kind in ("bf16", "f32")},
)
_PASSES = _Source(
    "passes",
    ("-ffp-contract=off",),
    "the kernel of masks and squares",
    {f"zero_lowest_{weight}_{rank}": _ZERO_LOWEST for weight in (16, 32) for rank in (16, 32)}
    | {f"squares_{kind}": _SQUARES for kind in ("bf16", "f32")},
)


class KernelUnavailable(RuntimeError):
    """There is no compiler, or the processor lacks instructions; the message says which."""


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled functions of packed_rows.c. Raises KernelUnavailable."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise KernelUnavailable(f"{_PACKED.title} is for Linux on x86-64, this is {platform.platform(terse=True)}")
    try:
        loaded = _loaded(_PACKED)
    except KernelUnavailable as error:
        raise KernelUnavailable(f"{_PACKED.title}: {error}") from error
    if not loaded.packed_supported():
        raise KernelUnavailable(f"{_PACKED.title} needs a processor with AVX-512 VBMI2 and AVX-512 BF16")
    return loaded


@tried_once(_PASSES.title)
def passes() -> ctypes.CDLL:
    """Return the compiled functions of passes.c after masking two weights; None where that fails, with a warning."""
    loaded = _loaded(_PASSES)
    weight, ranks = (ctypes.c_int32 * 2)(5, 7), (ctypes.c_int32 * 2)(0, 1)
    removed, out = (ctypes.c_int32 * 1)(1), (ctypes.c_int32 * 2)()
    loaded.zero_lowest_32_32(weight, ranks, removed, out, 1, 2, 1)
    if list(out) != [0, 7]:
        raise KernelUnavailable(f"it returned {list(out)} in a trial, expected [0, 7]")
    return loaded


def _loaded(source: _Source) -> ctypes.CDLL:
    compilers = [shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")]
    compiler = next((path for path in compilers if path is not None), None)
    if compiler is None:
        raise KernelUnavailable("there is no C compiler; install gcc or set CC")
    file = _cache() / f"{source.name}-{_digest(compiler, source)}.so"
    if not file.is_file():
        _compile(compiler, source, file)
    try:
        loaded = ctypes.CDLL(str(file))
        functions = {name: getattr(loaded, name) for name in source.functions}
    except (OSError, AttributeError) as error:  # a file of another system, or a damaged one
        raise KernelUnavailable(f"it cannot be loaded: {error}") from error
    for name, types in source.functions.items():
        function = functions[name]
        function.argtypes, function.restype = types, None
    return loaded


def _cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neuronal_ray"
    except RuntimeError as error:  # a user without a home directory, as in some containers
        raise KernelUnavailable("there is no home directory to keep it in; set XDG_CACHE_HOME") from error


def _digest(compiler: str, source: _Source) -> str:
    """Hash the source, the compiler's version and the flags."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    except OSError as error:
        raise KernelUnavailable(f"{compiler} cannot be started: {error.strerror}") from error
    flags = " ".join((*_EVERYWHERE, *source.flags))
    return hashlib.sha256(source.path.read_bytes() + version + flags.encode()).hexdigest()[:16]


def _compile(compiler: str, source: _Source, file: Path) -> None:
    """Write `file` atomically."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            made = Path(folder) / file.name
            command = [compiler, *_EVERYWHERE, *source.flags, "-o", str(made), str(source.path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no message"])[0]
                raise KernelUnavailable(f"{compiler} cannot compile it: {reason}")
            made.replace(file)
    except OSError as error:
        raise KernelUnavailable(f"it cannot be written to {file.parent}: {error.strerror}") from error
