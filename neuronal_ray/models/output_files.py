"""The files of a pruned model: which tensors each contains, under which names, and the files next to the weights."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from neuronal_ray.cli.atomic import write_json
from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.core.layout import Layout, LinearSpec
from neuronal_ray.models.blocks import find_blocks, find_linears, is_transposed, weight_of
from neuronal_ray.models.checkpoint import Checkpoint, empty_model
from neuronal_ray.models.companion_files import copy_companions
from neuronal_ray.models.experts import Expert, stack_name
from neuronal_ray.models.tensor_files import FILE_BYTES, consecutive_runs, file_name
from neuronal_ray.models.weight_files import INDEX


@dataclass(frozen=True, kw_only=True)
class OutputFile:
    """One safetensors file of the pruned model: its name, its blocks, and the stored names of its tensors."""

    file: str
    blocks: range
    names: tuple[str, ...]


def plan_output_files(
    checkpoint: Checkpoint, layout: Layout, shards: Sequence[range], *, trust_remote_code: bool = False
) -> list[OutputFile]:
    """Divide the pruned model into files of at most 4 GiB, or one larger block, each within one shard.

    The first file also has the tensors that belong to no linear.
    """
    model = empty_model(checkpoint, trust_remote_code=trust_remote_code)
    names = [_stored_names(checkpoint, model, specs) for specs in layout.blocks]
    sizes = [sum(checkpoint.tensors[name].num_bytes for name in of_block) for of_block in names]
    runs = [
        shard[run.start : run.stop]
        for shard in shards
        for run in consecutive_runs([sizes[block] for block in shard], limit=FILE_BYTES)
    ]
    rest = set(checkpoint.tensors).difference(*names)
    files = []
    for number, blocks in enumerate(runs, start=1):
        wanted = {name for block in blocks for name in names[block]} | (rest if number == 1 else set())
        files.append(
            OutputFile(
                file=file_name("model", number, len(runs)),
                blocks=blocks,
                names=tuple(name for name in checkpoint.tensors if name in wanted),  # in their order on disk
            )
        )
    return files


def _stored_names(checkpoint: Checkpoint, model: PreTrainedModel, specs: Sequence[LinearSpec]) -> set[str]:
    """Return the names under which the linears of one block are stored; `model` has no weights."""
    return set(_stored_shapes(checkpoint, model, specs[0].linear.block, [spec.linear.path for spec in specs]))


def _stored_shapes(
    checkpoint: Checkpoint, model: PreTrainedModel, block: int, paths: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Return the names under which some linears of one block are stored, with the shapes that the model expects."""
    blocks_name, blocks = find_blocks(model)
    linears = find_linears(blocks[block])
    values = {}
    for path in paths:
        weight = weight_of(linears[path])
        values[f"{blocks_name}.{block}.{path}.weight"] = weight.t() if is_transposed(linears[path]) else weight
    return {checkpoint.stored_name(name): tuple(weight.shape) for name, weight in stored_tensors(model, values).items()}


def stored_linears(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> list[str]:
    """Return the names under which all prunable linears are stored, blocks in order.

    Raises UnsupportedModel when one is missing or has another shape than in the model.
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


def copy_rest(checkpoint: Checkpoint, files: Sequence[OutputFile], target: Path) -> None:
    """Complete a directory whose weights are written: copy what belongs to it, then write the index."""
    copy_companions(checkpoint.path, target)
    write_index(target, {file.file: file.names for file in files}, total_size=checkpoint.num_bytes)


def write_index(directory: Path, names: Mapping[str, Iterable[str]], *, total_size: int) -> None:
    """Write the index of a sharded checkpoint, given the tensor names of each file; a single file needs none."""
    if len(names) > 1:
        weight_map = dict(sorted((name, file) for file, of_file in names.items() for name in of_file))
        write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def copy_whole(checkpoint: Checkpoint, target: Path, *, advance: Callable[[str], None]) -> Checkpoint:
    """Copy a whole checkpoint into `target` and return the copy; call `advance` with the name of each weight file."""
    copy_companions(checkpoint.path, target)
    for file in checkpoint.files:
        shutil.copyfile(file, target / file.name)
        advance(file.name)
    if checkpoint.index is not None:
        shutil.copyfile(checkpoint.index, target / INDEX)
    tensors = {name: replace(stored, path=target / stored.path.name) for name, stored in checkpoint.tensors.items()}
    return replace(checkpoint, path=target, tensors=tensors, index=None if checkpoint.index is None else target / INDEX)


def stored_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of linears (masks, weights) to the names and shapes in which checkpoints store them.

    `tensors` are keyed by the name of the linear's weight in `model`, which was loaded from the checkpoint, and shaped
    as in the module. Pass all linears of a block at once: experts are stacked into the model's 3-D parameters, and
    transformers' splitting, joining and renaming at loading are undone.
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
