"""Checkpoints of real shapes with random weights, for benchmarks: written piece by piece, never held in memory."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from neuronal_ray.cli.read_headers import Kind
from neuronal_ray.models.checkpoint import DTYPES
from neuronal_ray.models.output_files import write_index
from neuronal_ray.models.tensor_files import FILE_BYTES, begin_file, check_room, consecutive_runs, file_name

_SLICE = 2**22  # weights per random seed; slices are drawn in parallel
_ROOM = 2**26  # bytes in addition to the tensors: headers, configuration, the directory itself
_STORED = {dtype: name for name, dtype in DTYPES.items()}


def empty_llama(**config: int) -> PreTrainedModel:
    """Return a LLaMA without weights, for its shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**config))


def write_random_llama(
    path: Path, config: Mapping[str, int], *, dtype: torch.dtype, file_bytes: int = FILE_BYTES
) -> None:
    """Write a LLaMA with random weights as transformers initializes it: normal with `initializer_range`, norms of one.

    A tensor's content depends only on its name, shape and dtype. At most one tensor is in memory. `path` appears when
    the checkpoint is complete. Raises BadInput when the disk has not enough room.
    """
    llama = LlamaConfig(**config, dtype=dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_llama(**config).state_dict().items()}
    total = sum(_num_bytes(shape, dtype) for shape in shapes.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path, total + _ROOM, flag="--checkpoints")
    staging = path.with_name(f".{path.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        runs = consecutive_runs([_num_bytes(shape, dtype) for shape in shapes.values()], limit=file_bytes)
        entries = list(shapes.items())
        files = {
            file_name("model", number, len(runs)): dict(entries[run.start : run.stop])
            for number, run in enumerate(runs, start=1)
        }
        for name, tensors in files.items():
            _write_file(staging / name, tensors, dtype, llama.initializer_range)
        write_index(staging, files, total_size=total)
        llama.architectures = ["LlamaForCausalLM"]
        llama.save_pretrained(staging)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _write_file(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, scale: float) -> None:
    kinds = (Kind(name=name, dtype=_STORED[dtype], shape=shape) for name, shape in shapes.items())
    start = begin_file(path, ((kind, _num_bytes(kind.shape, dtype)) for kind in kinds))
    with path.open("r+b") as file:
        file.seek(start)
        for name, shape in shapes.items():
            for values in _values(name, shape, dtype, scale):
                file.write(values.view(torch.uint8).numpy().data)


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Iterator[Tensor]:
    """Yield the flat content of one tensor, slice by slice."""
    count = math.prod(shape)
    sizes = [min(_SLICE, count - start) for start in range(0, count, _SLICE)]
    if len(shape) == 1:
        yield torch.ones(count, dtype=dtype)
        return

    def drawn(number: int) -> Tensor:
        seed = hashlib.sha256(f"{name} {shape} {number}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        return torch.empty(sizes[number]).normal_(std=scale, generator=generator).to(dtype)

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        yield from pool.map(drawn, range(len(sizes)))
