"""Which files does the result have on disk, and which tensors lie in them under which names?"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.core.layout import Layout, LinearSpec
from neuronal_ray.models.blocks import find_blocks, find_linears, is_transposed, weight_of
from neuronal_ray.models.checkpoint import INDEX, WANTED, Checkpoint, empty_model
from neuronal_ray.models.experts import Expert, stack_name
from neuronal_ray.models.tensor_files import file_name

_PART_BYTES = 4 * 2**30


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
