"""Copies of checkpoints, for the tests of models."""

from pathlib import Path

from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.output_files import OutputFile, copy_rest
from neuronal_ray.models.tensor_copies import begin_output_file, copy_tensors


def copy_checkpoint(checkpoint: Checkpoint, target: Path) -> Checkpoint:
    """Copy a checkpoint into the directory `target`, as one file."""
    part = OutputFile(file="model.safetensors", blocks=range(0), names=tuple(checkpoint.tensors))
    written = begin_output_file(checkpoint, part, target)
    copy_tensors(checkpoint, written, part.names)
    copy_rest(checkpoint, [part], target)
    return written
