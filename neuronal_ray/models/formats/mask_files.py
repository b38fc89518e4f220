"""Mask files: which weights of a model's linears stay, to be applied to another copy of the model.

A mask file is a safetensors file. Under the stored name of each linear it has one bit per weight in row-major order,
the first in the lowest bit, set where the weight stays (as in core/packing.py). Its metadata has the shapes and the
fingerprint of config.json.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import Kind, Shape, Stored, read_header
from neuronal_ray.core.packing import pack_words
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.fingerprints import config_fingerprint
from neuronal_ray.models.tensor_copies import zero_masked
from neuronal_ray.models.tensor_files import CHECKSUMS, WORD_BYTES, Written, checksum, read_bytes, write_tensors

_FORMAT, _VERSION = "neuronal_ray masks", "1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """A checked mask file: bits and shapes of the masks by stored name, and the fingerprint of the model's config."""

    bits: dict[str, Stored]
    shapes: dict[str, tuple[int, ...]]
    config: str

    def mask(self, name: str) -> Tensor:
        """Read one mask, True where weights go."""
        shape = self.shapes[name]
        stays = np.unpackbits(read_bytes(self.bits[name]), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(stays == 0).view(shape)


def write_masks(
    checkpoint: Checkpoint,
    names: Sequence[str],
    path: Path,
    *,
    record: Mapping[str, object],
    advance: Callable[[str], None],
) -> int:
    """Write the masks of some tensors of a checkpoint; return the file's size in bytes.

    Weights that are zero, of either sign, go. Calls `advance` with the name of each tensor. `record` goes into the
    metadata: what is known of the masks.
    """
    tensors = {name: checkpoint.tensors[name] for name in names}
    kinds = {name: Kind(name=name, dtype="U8", shape=(_mask_bytes(stored.shape),)) for name, stored in tensors.items()}

    def masks() -> Iterator[Written]:
        for name, stored in tensors.items():
            word = WORD_BYTES[stored.dtype]
            bits, _ = pack_words(read_bytes(stored).view(f"u{word}") << 1)  # shifts the sign out
            yield Written.of(kinds[name], bits)
            advance(name)

    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": config_fingerprint(checkpoint.path),
        "record": json.dumps(record),
        "shapes": json.dumps({name: stored.shape for name, stored in tensors.items()}, separators=(",", ":")),
    }
    return write_tensors(path, masks(), possible=kinds.values(), metadata=metadata)


def _mask_bytes(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // 8)


def open_masks(path: Path) -> MaskFile:
    """Open and check a mask file. Raises BadInput when it is missing, of another format, truncated or damaged."""
    header = read_header(path, flag="--masks")
    header.check_format(path, _FORMAT, _VERSION, flag="--masks")
    shapes = header.entry(path, "shapes", dict[str, Shape], flag="--masks")
    checksums = header.entry(path, CHECKSUMS, dict[str, int], flag="--masks")
    sizes = {name: _mask_bytes(shape) for name, shape in shapes.items()}
    if sizes != {name: stored.num_bytes for name, stored in header.tensors.items()} or sizes.keys() != checksums.keys():
        raise BadInput(f"--masks: {path} is damaged: its header does not describe masks")
    damaged = [name for name, bits in header.tensors.items() if checksum(read_bytes(bits)) != checksums[name]]
    if damaged:
        raise BadInput(f"--masks: {path} is damaged: the mask of {damaged[0]} has another checksum")
    return MaskFile(bits=header.tensors, shapes=shapes, config=header.metadata.get("config", ""))


def check_masks(masks: MaskFile, checkpoint: Checkpoint) -> None:
    """Raise BadInput when the masks belong to another model; warn when only config.json differs."""
    for name, shape in masks.shapes.items():
        if name not in checkpoint.tensors:
            raise BadInput(f"--masks: {checkpoint.path} has no tensor {name}; the masks are of another model")
        if checkpoint.tensors[name].shape != shape:
            raise BadInput(
                f"--masks: the mask of {name} has shape {list(shape)}, the model's tensor "
                f"{list(checkpoint.tensors[name].shape)}; the masks are of another model"
            )
    if masks.config != config_fingerprint(checkpoint.path):
        logger.warning("--masks: made for a model with another config.json; names and shapes fit, so they are applied")


def apply_masks(masks: MaskFile, written: Checkpoint, *, advance: Callable[[str], None]) -> int:
    """Apply masks in place to a copy of a checkpoint; return the number of zeros in the masked tensors.

    Calls `advance` with the name of each tensor.
    """
    zeros = 0
    for name in masks.shapes:
        zeros += sum(zero_masked(written, written, {name: masks.mask(name)}).values())
        advance(name)
    return zeros
