"""Zeros in the files of a checkpoint, counted without loading a model."""

from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.output_files import stored_linears
from neuronal_ray.models.tensor_copies import count_zeros
from neuronal_ray.models.tensor_files import WORD_BYTES, read_bytes


def stored_zeros(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> int:
    """Return the number of zeros among the prunable weights: reads their tensors once, one at a time."""
    total = 0
    for name in stored_linears(checkpoint, trust_remote_code=trust_remote_code):
        stored = checkpoint.tensors[name]
        total += count_zeros(read_bytes(stored).view(f"u{WORD_BYTES[stored.dtype]}"))
    return total
