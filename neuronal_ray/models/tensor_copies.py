"""Copying the tensors of a checkpoint from file to file: unchanged, masked or replaced.

Several threads read, change and write pieces that fit in a core's cache: no file is mapped, no tensor is in memory as a
whole, and every byte of the new file is written once. Works on the bit patterns of any dtype.
"""

import math
import os
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.cli.read_headers import Stored, read_header
from neuronal_ray.models.checkpoint import DTYPES, Checkpoint
from neuronal_ray.models.output_files import OutputFile
from neuronal_ray.models.tensor_files import WORD_BYTES, begin_file, fill

_PIECE_BYTES = 2**19
_MOST_THREADS = 8
_ITEM: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}

_Change = Callable[[np.ndarray, np.ndarray, int], int]
"""Changes an array of bit patterns in place, and returns the number of zeros in it afterwards.

Arguments: the array, a scratch array of its size, and the position of its first number in the tensor.
"""


def begin_output_file(checkpoint: Checkpoint, file: OutputFile, target: Path) -> Checkpoint:
    """Create one file of a copy of the checkpoint in `target`, of its final size but without its tensors' bytes.

    Returns the copy with the tensors of that file.
    """
    path, tensors = target / file.file, ((name, checkpoint.tensors[name]) for name in file.names)
    begin_file(path, ((stored.kind(name), stored.num_bytes) for name, stored in tensors))
    return replace(checkpoint, path=target, tensors=read_header(path).tensors, index=None)


def copy_tensors(source: Checkpoint, written: Checkpoint, names: Collection[str]) -> None:
    """Copy some tensors unchanged."""
    with _Pieces(source, written) as pieces:
        for name in names:
            pieces.copy(name)


def zero_masked(source: Checkpoint, written: Checkpoint, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, int]:
    """Copy tensors with zeros for the masked weights; `written` may be the source itself.

    `masks`, by stored name and in the stored shape, are True where weights go; the others stay unchanged, bit for bit.
    Returns the number of zeros in each saved tensor, weights that were zero before included.
    """
    zeros = {}
    with _Pieces(source, written) as pieces:
        for name, mask in masks.items():
            goes = mask.cpu().contiguous().numpy().reshape(-1)
            zeros[name] = pieces.change(name, tuple(mask.shape), partial(_clear, goes))
    return zeros


def write_weights(
    source: Checkpoint, written: Checkpoint, weights: Mapping[str, Float[Tensor, "..."]]
) -> dict[str, int]:
    """Write new weights in place of the source's tensors, rounded to the stored dtype, one tensor at a time.

    `weights` are by stored name and in the stored shape. Returns the number of zeros in each saved tensor.
    Raises BadInput when a weight is not finite in the stored dtype.
    """
    zeros = {}
    with _Pieces(source, written) as pieces:
        for name, weight in weights.items():
            dtype = written.tensors[written.stored_name(name)].dtype
            if dtype not in WORD_BYTES:
                raise UnsupportedModel(f"--model: {name} is stored as {dtype}, expected one of {', '.join(WORD_BYTES)}")
            rounded = weight.cpu().to(DTYPES[dtype]) + 0.0  # turns -0.0 into 0.0
            if not bool(torch.isfinite(rounded).all()):
                raise BadInput(f"--model: new weights of {name} are not finite in the stored dtype {dtype}")
            words = rounded.contiguous().view(torch.uint8).numpy().reshape(-1).view(_ITEM[WORD_BYTES[dtype]])
            zeros[name] = pieces.change(name, tuple(weight.shape), partial(_put, words), reads=False)
    return zeros


def count_zeros(bits: np.ndarray) -> int:
    """Count the zeros, of either sign, among floating-point numbers given by their bit patterns."""
    flat, step = bits.reshape(-1), _PIECE_BYTES // bits.itemsize
    scratch = np.empty(min(step, flat.size), flat.dtype)
    pieces = (flat[start : start + step] for start in range(0, flat.size, step))
    return sum(_zeros(piece, scratch[: piece.size]) for piece in pieces)


def _zeros(bits: np.ndarray, scratch: np.ndarray) -> int:
    all_but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    return bits.size - int(np.count_nonzero(np.bitwise_and(bits, all_but_sign, out=scratch)))


def _clear(goes: np.ndarray, bits: np.ndarray, scratch: np.ndarray, begin: int) -> int:
    """Set numbers to zero where `goes` is True (see _Change).

    A vectorized AND: assignment through a boolean index takes one number at a time.
    """
    signed = np.dtype(f"i{bits.itemsize}")
    mask = goes[begin : begin + bits.size].view(np.int8)
    stays = np.subtract(mask, 1, dtype=signed, out=scratch.view(signed))  # all bits set where a number stays
    np.bitwise_and(bits.view(signed), stays, out=bits.view(signed))
    return _zeros(bits, scratch)


def _put(words: np.ndarray, bits: np.ndarray, scratch: np.ndarray, begin: int) -> int:
    """Replace the numbers by those of `words` (see _Change)."""
    bits[...] = words[begin : begin + bits.size]
    return _zeros(bits, scratch)


class _Pieces:
    """Open files of a checkpoint and of its copy, and threads that copy pieces of tensors between them."""

    def __init__(self, source: Checkpoint, written: Checkpoint) -> None:
        self._source, self._written = source, written
        self._open_files = ExitStack()
        self._files: dict[tuple[Path, int], int] = {}
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1))
        self._buffers = threading.local()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)  # after an error, threads may still be using the files
        self._open_files.close()

    def copy(self, name: str) -> None:
        """Copy one tensor unchanged."""
        source, target = self._source.tensors[name], self._written.tensors[name]
        self._run(source, target, np.dtype(np.uint8), None)

    def change(self, name: str, shape: tuple[int, ...], change: _Change, *, reads: bool = True) -> int:
        """Copy one tensor through `change` and return its number of zeros; without `reads` the source is not read.

        Raises UnsupportedModel when the tensor's shape is not `shape`.
        """
        stored = self._written.stored_name(name)
        target = self._written.tensors[stored]
        if shape != target.shape:
            raise UnsupportedModel(f"--model: {name} is stored as {target.shape}, the model has {shape}")
        item = np.dtype(_ITEM[target.num_bytes // math.prod(shape)])
        return self._run(self._source.tensors[stored] if reads else None, target, item, change)

    def _run(self, source: Stored | None, target: Stored, item: np.dtype, change: _Change | None) -> int:
        origin = None if source is None else (self._open(source.path, os.O_RDONLY), source.start)
        writing, step = self._open(target.path, os.O_WRONLY), _PIECE_BYTES // item.itemsize
        total = target.num_bytes // item.itemsize

        def copy_piece(begin: int) -> int:
            bits, scratch = (buffer.view(item)[: min(step, total - begin)] for buffer in self._thread_buffers())
            if origin is not None and not fill(origin[0], bits, origin[1] + begin * item.itemsize):
                raise OSError("--model: a file has become shorter since it was opened")
            zeros = 0 if change is None else change(bits, scratch, begin)
            _write(writing, bits, target.start + begin * item.itemsize)
            return zeros

        return sum(self._threads.map(copy_piece, range(0, total, step)))

    def _open(self, path: Path, flags: int) -> int:
        if (path, flags) not in self._files:
            self._files[path, flags] = os.open(path, flags)
            self._open_files.callback(os.close, self._files[path, flags])
        return self._files[path, flags]

    def _thread_buffers(self) -> tuple[np.ndarray, np.ndarray]:
        """Return this thread's two buffers: a piece and its scratch."""
        if not hasattr(self._buffers, "pair"):
            self._buffers.pair = tuple(np.empty(_PIECE_BYTES, np.uint8) for _ in range(2))
        pair: tuple[np.ndarray, np.ndarray] = self._buffers.pair
        return pair


def _write(file: int, bits: np.ndarray, offset: int) -> None:
    left = bits.view(np.uint8).data
    while left:
        count = os.pwrite(file, left, offset)
        left, offset = left[count:], offset + count
