"""The forms that a model is written in: each writer checks the model, writes --output and returns lines to print."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from neuronal_ray.cli.atomic import staged, staged_file, write_json
from neuronal_ray.cli.progress import Progress
from neuronal_ray.export.config import ExportConfig
from neuronal_ray.export.record import RECORD, Counts, check_record, counts_of, new_record, stated_counts
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.companion_files import copy_companions
from neuronal_ray.models.formats.audit import LinearZeros, audit
from neuronal_ray.models.formats.mask_files import apply_masks, check_masks, open_masks, write_masks
from neuronal_ray.models.formats.onnx_graph import FILE, check_needs, export_onnx
from neuronal_ray.models.formats.packed_files import PackedModel, open_packed, write_packed
from neuronal_ray.models.output_files import copy_whole
from neuronal_ray.models.tensor_files import check_room


def _dense(config: ExportConfig, checkpoint: Checkpoint) -> list[str]:
    """Check a Hugging Face directory with zeros in it, as `prune` writes it; copy it if there is an output."""
    if config.output is not None:
        check_room(config.output, checkpoint.num_bytes, flag="--output")
    progress = Progress()
    masks = None if config.masks is None else open_masks(config.masks)
    if masks is not None:
        check_masks(masks, checkpoint)
    linears = _audit(checkpoint, config, progress)
    if masks is None:
        check_record(checkpoint.path, counts_of(linears))
    if config.output is None:
        return _sparsity(linears)
    with staged(config.output, overwrite=config.overwrite) as staging:
        with progress.stage("copying", len(checkpoint.files)) as advance:
            written = copy_whole(checkpoint, staging, advance=advance)
        if masks is not None:
            with progress.stage("masking", len(masks.shapes)) as advance:
                apply_masks(masks, written, advance=advance)
        linears = _audit(written, config, progress)
        _record(staging, checkpoint, counts_of(linears), config, changed=masks is not None)
    return [*_sparsity(linears), f"model: {config.output}"]


def _audit(checkpoint: Checkpoint, config: ExportConfig, progress: Progress) -> list[LinearZeros]:
    stated_counts(checkpoint.path)  # refused before any weight is read
    with progress.stage("checking", len(checkpoint.tensors)) as advance:
        return audit(checkpoint, advance=advance, trust_remote_code=config.trust_remote_code)


def _record(
    staging: Path, checkpoint: Checkpoint, counted: Counts, config: ExportConfig, *, changed: bool = False
) -> None:
    """Write the record of an export, of what was counted in the files that were written."""
    record = new_record(checkpoint.path, counted, model=config.model, form=config.format, changed=changed)
    write_json(staging / RECORD, record)


def _check_equal(written: Counts, counted: Counts, path: Path) -> None:
    """Raise OSError when files have other zeros than the model that they were made of: a disk's fault."""
    if written != counted:
        raise OSError(f"{path} has {written} zeros after it was written, the model {counted}")


def _packed(config: ExportConfig, checkpoint: Checkpoint) -> list[str]:
    """Write bits and values in place of sparse tensors, for `neuronal_ray.load_packed`."""
    assert config.output is not None
    progress = Progress()
    linears = _audit(checkpoint, config, progress)
    with staged(config.output, overwrite=config.overwrite) as staging:
        copy_companions(checkpoint.path, staging)
        with progress.stage("packing", len(checkpoint.files)) as advance:
            write_packed(checkpoint, staging, advance=advance)
        packed = open_packed(staging, trust_remote_code=config.trust_remote_code)
        zeros = sum(packed.tensors[linear.name].zeros() for linear in linears)
        found = Counts(pruned=zeros, prunable=sum(packed.tensors[linear.name].size for linear in linears))
        _check_equal(found, counts_of(linears), config.output)
        _record(staging, checkpoint, found, config)
        lines = _sizes(packed)
    return [*lines, f"packed model: {config.output}"]


def _masks(config: ExportConfig, checkpoint: Checkpoint) -> list[str]:
    """Write one file with a bit per weight of the linears, for --masks."""
    assert config.output is not None
    progress = Progress()
    counted = counts_of(linears := _audit(checkpoint, config, progress))
    record = new_record(checkpoint.path, counted, model=config.model, form=config.format)
    with staged_file(config.output) as staging:
        with progress.stage("masks", len(linears)) as advance:
            names = [linear.name for linear in linears]
            size = write_masks(checkpoint, names, staging, record=record, advance=advance)
        masks = open_masks(staging)
        zeros = sum(int(masks.mask(name).sum()) for name in masks.shapes)
        found = Counts(pruned=zeros, prunable=sum(math.prod(shape) for shape in masks.shapes.values()))
        _check_equal(found, counted, config.output)
    return [f"masks of {len(linears)} tensors, {size:,} bytes: {config.output}"]


def _onnx(config: ExportConfig, checkpoint: Checkpoint) -> list[str]:
    """Write a graph that generates, with a key/value cache, for ONNX Runtime and others."""
    assert config.output is not None
    check_needs()
    progress = Progress()
    counted = counts_of(_audit(checkpoint, config, progress))
    with staged(config.output, overwrite=config.overwrite) as staging, progress.stage("onnx", 1) as advance:
        export_onnx(checkpoint.path, staging)
        _record(staging, checkpoint, counted, config)
        advance("")
    size = sum(file.stat().st_size for file in config.output.glob(f"{FILE}*"))
    return [f"{FILE} and its weights, {size:,} bytes in float32, zeros included: {config.output}"]


WRITERS: dict[str, Callable[[ExportConfig, Checkpoint], list[str]]] = {
    "dense": _dense,
    "packed": _packed,
    "masks": _masks,
    "onnx": _onnx,
}
"""By the names of --format."""


def _sparsity(linears: Sequence[LinearZeros]) -> list[str]:
    """Return the share of zeros of every linear's tensor, and of all, as lines."""
    width = max(len(linear.name) for linear in linears)
    zeros, size = sum(linear.zeros for linear in linears), sum(linear.size for linear in linears)
    rows = [
        f"{linear.name:<{width}}  {' x '.join(map(str, linear.shape)):>18}  {linear.zeros / linear.size:8.4%}"
        for linear in linears
    ]
    return [*rows, f"{zeros:,} of {size:,} weights are zero: {zeros / size:.4%}"]


def _sizes(packed: PackedModel) -> list[str]:
    """Return the bytes before and after, and the least that bits and values take, as lines."""
    sparse = [tensor for tensor in packed.tensors.values() if tensor.bits is not None]
    others = [tensor for tensor in packed.tensors.values() if tensor.bits is None]
    files = sum(file.stat().st_size for file in packed.files)
    lines = [f"{len(others)} tensors as they were: {sum(tensor.num_bytes for tensor in others):,} bytes"]
    if sparse:
        dense, now = sum(tensor.dense_bytes for tensor in sparse), sum(tensor.num_bytes for tensor in sparse)
        kept = sum(tensor.kept for tensor in sparse) / sum(tensor.size for tensor in sparse)
        lines += [
            f"{len(sparse)} tensors packed, {kept:.4%} of their weights kept: {now:,} bytes, {now / dense:.4%} of "
            f"{dense:,}; the least for bits and values is {sum(tensor.least_bytes for tensor in sparse):,}"
        ]
    return [*lines, f"files: {files:,} bytes, headers included"]
