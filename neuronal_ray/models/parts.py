"""The result on disk: safetensors files that each hold some of the blocks, copied and then changed in place."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from neuronal_ray.core.layout import Layout, LinearSpec
from neuronal_ray.models.blocks import find_blocks, find_linears, is_transposed, weight_of
from neuronal_ray.models.checkpoint import DTYPES, INDEX, WANTED, Checkpoint, empty_model
from neuronal_ray.models.experts import Expert, stack_name
from neuronal_ray.models.tensor_files import WORD_BYTES, encoded_header, file_name
from neuronal_ray.models.unsupported import UnsupportedModel

_PART_BYTES = 4 * 2**30
_COPIED_BYTES = 2**24
_SLAB = 2**17  # numbers at a time: they and their mask stay in a core's cache
_ITEM: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One safetensors file of the result: its name, its tensors by stored name, and the blocks that it has."""

    file: str
    blocks: range
    names: tuple[str, ...]


def split_parts(
    checkpoint: Checkpoint, layout: Layout, shards: Sequence[range], *, trust_remote_code: bool = False
) -> list[Part]:
    """The files of the result: each within one shard, of a few GiB; the first also has what is in no linear."""
    model = empty_model(checkpoint, trust_remote_code=trust_remote_code)
    names = [_stored_names(checkpoint, model, specs) for specs in layout.blocks]
    runs: list[list[int]] = []
    for shard in shards:
        size = _PART_BYTES
        for block in shard:
            block_bytes = sum(checkpoint.tensors[name].num_bytes for name in names[block])
            if size + block_bytes > _PART_BYTES:
                runs.append([])
                size = 0
            runs[-1].append(block)
            size += block_bytes
    rest = set(checkpoint.tensors).difference(*names)
    parts = []
    for number, run in enumerate(runs, start=1):
        wanted = {name for block in run for name in names[block]} | (rest if number == 1 else set())
        parts.append(
            Part(
                file=file_name("model", number, len(runs)),
                blocks=range(run[0], run[-1] + 1),
                names=tuple(name for name in checkpoint.tensors if name in wanted),  # in their order on disk
            )
        )
    return parts


def _stored_names(checkpoint: Checkpoint, model: PreTrainedModel, specs: Sequence[LinearSpec]) -> set[str]:
    """The names under which the linears of one block are stored; `model` is an empty one."""
    return set(_stored_shapes(checkpoint, model, specs[0].linear.block, [spec.linear.path for spec in specs]))


def _stored_shapes(
    checkpoint: Checkpoint, model: PreTrainedModel, block: int, paths: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """The names under which some linears of one block are stored, and the shapes that the model gives them."""
    blocks_name, blocks = find_blocks(model)
    linears = find_linears(blocks[block])
    values = {}
    for path in paths:
        weight = weight_of(linears[path])
        values[f"{blocks_name}.{block}.{path}.weight"] = weight.t() if is_transposed(linears[path]) else weight
    return {checkpoint.stored_name(name): tuple(weight.shape) for name, weight in stored_tensors(model, values).items()}


def stored_linears(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> list[str]:
    """The names under which all prunable linears are stored, blocks in order.

    Raises UnsupportedModel when one is not there or has another shape than the model's.
    """
    model = empty_model(checkpoint, trust_remote_code=trust_remote_code)
    names = []
    for index, block in enumerate(find_blocks(model)[1]):
        for name, shape in _stored_shapes(checkpoint, model, index, find_linears(block)).items():
            if checkpoint.tensors[name].shape != shape:
                raise UnsupportedModel(
                    f"--model: {name} is stored as {checkpoint.tensors[name].shape}, the model has {shape}"
                )
            names.append(name)
    return names


def copy_part(checkpoint: Checkpoint, part: Part, target: Path) -> Checkpoint:
    """Write one file of a copy of the checkpoint into `target`; returns where its tensors lie there."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    for name in part.names:
        stored = checkpoint.tensors[name]
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + stored.num_bytes],
        }
        begins[name] = offset
        offset += stored.num_bytes
    encoded = encoded_header(header)
    data, path = 8 + len(encoded), target / part.file
    with ExitStack() as stack:
        sources = {file: stack.enter_context(file.open("rb")) for file in checkpoint.files}
        written = stack.enter_context(path.open("wb"))
        written.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in part.names:
            stored = checkpoint.tensors[name]
            source = sources[stored.path]
            source.seek(stored.start)
            left = stored.num_bytes
            while left:
                chunk = source.read(min(left, _COPIED_BYTES))
                written.write(chunk)
                left -= len(chunk)
    tensors = {}
    for name, begin in begins.items():
        stored = checkpoint.tensors[name]
        tensors[name] = replace(stored, path=path, start=data + begin, stop=data + begin + stored.num_bytes)
    return replace(checkpoint, path=target, tensors=tensors)


def copy_rest(checkpoint: Checkpoint, parts: Sequence[Part], target: Path) -> None:
    """Everything but the weights, once those are written: configuration, tokenizer and, last, the index of files."""
    copy_descriptions(checkpoint, target)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": checkpoint.num_bytes},
            "weight_map": {name: part.file for part in parts for name in part.names},
        }
        temporary = target / f".{INDEX}.partial"
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        temporary.replace(target / INDEX)


def copy_descriptions(checkpoint: Checkpoint, target: Path) -> None:
    """Everything but the weights and their index: configuration, tokenizer, and what was found about the model."""
    for file in sorted(checkpoint.path.iterdir()):
        wanted = any(file.match(pattern) for pattern in WANTED)
        if file.is_file() and wanted and file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, target / file.name)


def copy_whole(checkpoint: Checkpoint, target: Path, *, advance: Callable[[str], None]) -> Checkpoint:
    """Copy all of a checkpoint into `target`, file by file, each told to `advance`; where its tensors lie there."""
    copy_descriptions(checkpoint, target)
    for file in checkpoint.files:
        shutil.copyfile(file, target / file.name)
        advance(file.name)
    if (checkpoint.path / INDEX).is_file():
        shutil.copyfile(checkpoint.path / INDEX, target / INDEX)
    tensors = {name: replace(stored, path=target / stored.path.name) for name, stored in checkpoint.tensors.items()}
    return replace(checkpoint, path=target, tensors=tensors)


def stored_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of linears (masks, weights) under the names and in the shapes in which checkpoints store them.

    `tensors`: by the name of the linear's weight in `model`, which was loaded from the checkpoint, and as the module
    keeps it. To be called with all linears of a block at once: experts are joined to the model's 3-D parameters, and
    what transformers split, joined or renamed at loading is undone.
    """
    whole: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, Expert):
            stacks.setdefault(stack_name(name, module), {})[module.index] = tensor
        else:
            whole[name] = tensor
    for name, experts in stacks.items():
        assert len(experts) == len(model.get_parameter(name)), f"{name} has other experts than {sorted(experts)}"
        whole[name] = torch.stack([experts[index] for index in range(len(experts))])
    stored: dict[str, Tensor] = revert_weight_conversion(model, whole)
    return stored


def zero_masked(written: Checkpoint, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, int]:
    """Zero the masked weights of a copy, in place, one tensor in memory at a time.

    `masks`, by stored name and in the stored shape, are True where weights go. Works on the bits of any dtype: what
    stays is unchanged. Returns the number of zeros of each tensor as saved (weights that were zero before included).
    """
    zeros = {}
    for name, mask in masks.items():
        with _bits(written, name, tuple(mask.shape)) as bits:
            zeros[name] = _clear(bits.reshape(-1), mask.cpu().contiguous().numpy().reshape(-1))
    return zeros


def _clear(bits: np.ndarray, mask: np.ndarray) -> int:
    """Zero numbers, given by their bits, where `mask` is True; how many are zero then.

    An AND by the vector: assignment through a mask takes one number at a time.
    """
    signed, zeros = np.dtype(f"i{bits.itemsize}"), 0
    for start in range(0, bits.size, _SLAB):
        here = bits[start : start + _SLAB]
        stays = np.subtract(mask[start : start + _SLAB].view(np.int8), 1, dtype=signed)  # all bits where it does
        np.bitwise_and(here.view(signed), stays, out=here.view(signed))
        zeros += count_zeros(here)
    return zeros


def write_weights(written: Checkpoint, weights: Mapping[str, Float[Tensor, "..."]]) -> dict[str, int]:
    """Replace weights of a copy, in place, rounded to the stored dtype, one at a time.

    `weights` are by stored name and in the stored shape. Returns the number of zeros of each tensor as saved.
    Raises ValueError when a finite weight is too large for the stored dtype.
    """
    zeros = {}
    for name, weight in weights.items():
        dtype = written.tensors[written.stored_name(name)].dtype
        if dtype not in WORD_BYTES:
            raise UnsupportedModel(f"--model: {name} is stored as {dtype}, expected one of {', '.join(WORD_BYTES)}")
        rounded = weight.cpu().to(DTYPES[dtype]) + 0.0  # makes positive zeros of negative ones
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"--model: new weights of {name} are not finite in the stored dtype {dtype}")
        with _bits(written, name, tuple(weight.shape)) as bits:
            bits[...] = rounded.contiguous().view(torch.uint8).numpy().view(bits.dtype)
            zeros[name] = count_zeros(bits)
    return zeros


@contextmanager
def _bits(written: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[np.memmap]:
    """The bits of one tensor of a copy, as unsigned integers of its shape; changes reach the file on exit."""
    stored = written.tensors[written.stored_name(name)]
    if shape != stored.shape:
        raise UnsupportedModel(f"--model: {name} is stored as {stored.shape}, the model has {shape}")
    item = _ITEM[stored.num_bytes // math.prod(shape)]
    bits = np.memmap(stored.path, item, "r+", offset=stored.start, shape=shape)
    yield bits
    bits.flush()


def count_zeros(bits: np.ndarray) -> int:
    """How many floating-point numbers, given by their bits, are zero, of either sign."""
    all_but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    flat = bits.reshape(-1)
    slabs = (flat[start : start + _SLAB] for start in range(0, flat.size, _SLAB))
    return flat.size - sum(int(np.count_nonzero(slab & all_but_sign)) for slab in slabs)
