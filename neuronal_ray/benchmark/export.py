"""Packing and loading packed models, compared with plain sequential I/O of the dense bytes."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from neuronal_ray.benchmark.output import add_output, check_figures
from neuronal_ray.benchmark.record import publish
from neuronal_ray.benchmark.shapes import kept_or_temporary
from neuronal_ray.cli.memory import peak_bytes, reset_peak, resident_bytes
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.read_headers import Kind
from neuronal_ray.core.packing import pack_words, unpack_words
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.models.companion_files import copy_companions
from neuronal_ray.models.formats.packed_files import open_packed, write_packed
from neuronal_ray.models.formats.packed_loading import load_packed
from neuronal_ray.models.synthetic import empty_llama
from neuronal_ray.models.tensor_files import Written, checksum, write_tensors

_ROUNDS = 3
_SPARSITY = 0.7
_CHUNK = 2**24
_LEAST = 0.5
_MODEL = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
}


@dataclass(frozen=True, kw_only=True)
class ExportMeasured:
    """Sizes in bytes, medians of seconds. Unless warm, reads come from the disk and writes end on it."""

    dense_bytes: int
    prunable_bytes: int
    packed_bytes: int
    least_bytes: int
    files_bytes: int
    kept: float
    write_s: float
    read_s: float
    pack_s: float
    pack_warm_s: float
    load_s: float
    load_warm_s: float
    core_pack_s: float
    core_unpack_s: float
    core_bytes: int
    packing_peak: int
    loading_peak: int
    largest_bytes: int

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""

        def rate(seconds: float) -> str:
            return f"{seconds:7.2f} s  {self.dense_bytes / seconds / 1e9:6.2f} GB/s of dense bytes"

        share = self.packed_bytes / self.prunable_bytes
        expected = self.kept + 1 / 16
        return [
            f"packed export of a 16-bit LLaMA of {self.dense_bytes / 1e9:.2f} GB, {1 - self.kept:.2%} of its linears' "
            f"weights zero, medians of {_ROUNDS} rounds",
            f"  sequential write, synced  {rate(self.write_s)}",
            f"  pack, cold and synced     {rate(self.pack_s)}, / write = {self.write_s / self.pack_s:.2f} "
            f"(at least {_LEAST:g})",
            f"  pack, from memory         {rate(self.pack_warm_s)}",
            f"  sequential read, cold     {rate(self.read_s)}",
            f"  load, cold                {rate(self.load_s)}, / read = {self.read_s / self.load_s:.2f} "
            f"(at least {_LEAST:g})",
            f"  load, from memory         {rate(self.load_warm_s)}",
            f"  one core, in memory       pack {self.core_bytes / self.core_pack_s / 1e9:.2f}, "
            f"unpack {self.core_bytes / self.core_unpack_s / 1e9:.2f} GB/s of dense bytes",
            f"  linears                   {self.packed_bytes:,} of {self.prunable_bytes:,} bytes, {share:.4%}; "
            f"kept + 1/16 = {expected:.4%}, {share / expected - 1:+.4%}",
            f"  least for bits and values {self.least_bytes:,} bytes, {self.packed_bytes - self.least_bytes:,} more "
            f"taken; files {self.files_bytes:,} bytes",
            f"  memory at the peak        packing {self.packing_peak / 2**20:.0f} MiB, loading "
            f"{(self.loading_peak - self.dense_bytes) / 2**20:.0f} MiB on top of the model; the largest tensor has "
            f"{self.largest_bytes / 2**20:.0f} MiB",
        ]


def main(argv: Sequence[str]) -> None:
    """Measure in a temporary directory."""
    parser = Parser(
        prog="neuronal-ray benchmark export",
        description="Time packing and loading a 16-bit checkpoint of 1.5 GB, and plain reading and writing.",
    )
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_figures(arguments)
    with kept_or_temporary(None) as folder:
        measured = measure_export(folder)
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def measure_export(folder: Path) -> ExportMeasured:
    """Write a checkpoint of 1.5 GB into `folder`, pack and load it, and time plain I/O of as many bytes."""
    dense, packed = folder / "dense", folder / "packed"
    dense.mkdir()
    _write_checkpoint(dense)
    checkpoint = open_checkpoint(dense)
    size = checkpoint.num_bytes
    seconds: dict[str, list[float]] = {}

    def timed(name: str, call: Callable[[], object]) -> None:
        begin = time.perf_counter()
        call()
        seconds.setdefault(name, []).append(time.perf_counter() - begin)

    def pack() -> None:
        shutil.rmtree(packed, ignore_errors=True)
        packed.mkdir()
        copy_companions(checkpoint.path, packed)
        write_packed(checkpoint, packed, advance=lambda _: None)

    def pack_synced() -> None:
        pack()
        _sync(packed)

    packing_peak = _growth(pack)
    loading_peak = _growth(lambda: load_packed(packed))
    for _ in range(_ROUNDS):
        timed("write", lambda: _write_sequentially(folder / "plain", size))
        (folder / "plain").unlink()
        _forget(dense)
        timed("pack", pack_synced)
        timed("pack warm", pack)
        _forget(dense)
        timed("read", lambda: _read_sequentially(dense))
        _forget(packed)
        timed("load", lambda: load_packed(packed))
        timed("load warm", lambda: load_packed(packed))
    opened = open_packed(packed)
    sparse = [tensor for tensor in opened.tensors.values() if tensor.bits is not None]
    words = _some_words(2**24)
    bits, values = pack_words(words)
    for _ in range(_ROUNDS):
        timed("core pack", lambda: pack_words(words))
        timed("core unpack", lambda: unpack_words(bits, values, len(words)))
    medians = {name: median(times) for name, times in seconds.items()}
    return ExportMeasured(
        dense_bytes=size,
        prunable_bytes=sum(tensor.dense_bytes for tensor in sparse),
        packed_bytes=sum(tensor.num_bytes for tensor in sparse),
        least_bytes=sum(tensor.least_bytes for tensor in sparse),
        files_bytes=sum(file.stat().st_size for file in opened.files),
        kept=sum(tensor.kept for tensor in sparse) / sum(tensor.size for tensor in sparse),
        write_s=medians["write"],
        read_s=medians["read"],
        pack_s=medians["pack"],
        pack_warm_s=medians["pack warm"],
        load_s=medians["load"],
        load_warm_s=medians["load warm"],
        core_pack_s=medians["core pack"],
        core_unpack_s=medians["core unpack"],
        core_bytes=words.nbytes,
        packing_peak=packing_peak,
        loading_peak=loading_peak,
        largest_bytes=max(stored.num_bytes for stored in checkpoint.tensors.values()),
    )


def _write_checkpoint(path: Path) -> None:
    """Write a LLaMA in bfloat16 with sparse linears; its numbers repeat, from which packing gains nothing."""
    model = empty_llama(**_MODEL).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    sparse = _some_words(2**24)
    dense = np.where(sparse == 0, np.uint16(0x3C00), sparse)
    kinds = {
        name: Kind(name=name, dtype="BF16", shape=tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    }
    tensors = (
        Written(kind=kind, data=data, checksum=checksum(data))
        for name, kind in kinds.items()
        for data in [np.resize(sparse if name.endswith("_proj.weight") else dense, int(np.prod(kind.shape)))]
    )
    write_tensors(path / "model.safetensors", tensors, possible=kinds.values(), metadata={"format": "pt"})
    _sync(path)


def _some_words(count: int) -> np.ndarray:
    """Return the bits of small normal bfloat16 numbers of both signs, a share of `_SPARSITY` zero."""
    source = np.random.default_rng(0)
    words = source.integers(0x3800, 0x3E00, count, dtype=np.uint16) | (source.integers(0, 2, count, np.uint16) << 15)
    words[source.random(count, np.float32) < _SPARSITY] = 0
    return words


def _write_sequentially(path: Path, size: int) -> None:
    chunk = np.random.default_rng(0).bytes(_CHUNK)
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, _CHUNK):
            file.write(chunk[: size - start])
        os.fsync(file.fileno())


def _read_sequentially(folder: Path) -> None:
    chunk = bytearray(_CHUNK)
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(chunk):
                pass


def _sync(folder: Path) -> None:
    """Wait until a folder's files are on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _forget(folder: Path) -> None:
    """Make the system drop a folder's files from memory."""
    _sync(folder)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _growth(call: Callable[[], object]) -> int:
    """Return the bytes by which this process was larger, at the most, while `call` ran."""
    reset_peak()
    before = resident_bytes()
    call()
    return peak_bytes() - before
