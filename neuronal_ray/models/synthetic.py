"""Checkpoints of real shapes with random weights, for benchmarks: written file by file, never held in memory."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from neuronal_ray.models.checkpoint import DTYPES, INDEX
from neuronal_ray.models.tensor_files import Kind, begin_file, check_room, file_name

PART_BYTES = 4 * 2**30
"""The largest file of weights, if no tensor is larger."""

_SLICE = 2**22  # weights with a seed of their own: they are drawn in parallel
_ROOM = 2**26  # bytes beside the tensors: headers, configuration, the directory itself
_STORED = {dtype: name for name, dtype in DTYPES.items()}


def empty_llama(**config: int) -> PreTrainedModel:
    """A LLaMA without weights, for the shapes of models that are not at hand."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**config))


def write_random_llama(
    path: Path, config: Mapping[str, int], *, dtype: torch.dtype, part_bytes: int = PART_BYTES
) -> None:
    """A LLaMA with random weights as transformers initializes it: normal with `initializer_range`, norms of one.

    A tensor's content depends on its name, shape and dtype alone. At most one tensor is in memory. Appears at `path`
    when it is complete. Raises BadInput when the disk has not enough room.
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
        parts = _parts(shapes, dtype, part_bytes)
        names = [file_name("model", number, len(parts)) for number in range(1, len(parts) + 1)]
        for name, part in zip(names, parts, strict=True):
            _write_part(staging / name, part, dtype, llama.initializer_range)
        if len(parts) > 1:
            weight_map = {tensor: name for name, part in zip(names, parts, strict=True) for tensor in part}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (staging / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        llama.architectures = ["LlamaForCausalLM"]
        llama.save_pretrained(staging)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _parts(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, part_bytes: int
) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file, in the model's order."""
    parts: list[dict[str, tuple[int, ...]]] = []
    size = part_bytes
    for name, shape in shapes.items():
        if size + _num_bytes(shape, dtype) > part_bytes:
            parts.append({})
            size = 0
        parts[-1][name] = shape
        size += _num_bytes(shape, dtype)
    return parts


def _write_part(path: Path, part: Mapping[str, tuple[int, ...]], dtype: torch.dtype, scale: float) -> None:
    kinds = (Kind(name=name, dtype=_STORED[dtype], shape=shape) for name, shape in part.items())
    start = begin_file(path, ((kind, _num_bytes(kind.shape, dtype)) for kind in kinds))
    with path.open("r+b") as file:
        file.seek(start)
        for name, shape in part.items():
            for values in _values(name, shape, dtype, scale):
                file.write(values.view(torch.uint8).numpy().data)


def _values(name: str, shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> Iterator[Tensor]:
    """The flat content of one tensor, slice by slice."""
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
