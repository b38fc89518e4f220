"""A mask file: which weights of a model's linears stay, to be applied to another copy of the model.

Safetensors: under the stored name of each linear one bit per weight in row-major order, the first in the lowest bit,
set where the weight stays (as in core/packing.py). Shapes are in the metadata, as is config.json's fingerprint.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.packing import pack_words
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.fingerprints import config_fingerprint
from neuronal_ray.models.tensor_copies import zero_masked
from neuronal_ray.models.tensor_files import (
    CHECKSUMS,
    WORD_BYTES,
    Kind,
    Stored,
    Written,
    checksum,
    read_bytes,
    read_header,
    write_tensors,
)

_FORMAT, _VERSION = "neuronal_ray masks", "1"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class MaskFile:
    """A mask file that has been found whole: its bits by stored name, the shapes of the masks, and whose they are."""

    bits: dict[str, Stored]
    shapes: dict[str, tuple[int, ...]]
    config: str

    def mask(self, name: str) -> Tensor:
        """One mask, True where weights go."""
        shape = self.shapes[name]
        stays = np.unpackbits(read_bytes(self.bits[name]), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(stays == 0).view(shape)


def write_masks(checkpoint: Checkpoint, names: Sequence[str], path: Path, *, advance: Callable[[str], None]) -> int:
    """Write the masks of some tensors of a checkpoint, each told to `advance`; returns the file's size in bytes.

    A weight that is zero, of either sign, goes.
    """
    stored = {name: checkpoint.tensors[name] for name in names}
    kinds = {name: Kind(name=name, dtype="U8", shape=(-(-math.prod(one.shape) // 8),)) for name, one in stored.items()}

    def masks() -> Iterator[Written]:
        for name, one in stored.items():
            word = WORD_BYTES[one.dtype]
            bits, _ = pack_words(read_bytes(one).view(f"u{word}") << 1)  # without the sign
            yield Written(kind=kinds[name], data=bits, checksum=checksum(bits))
            advance(name)

    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": config_fingerprint(checkpoint.path),
        "shapes": json.dumps({name: one.shape for name, one in stored.items()}, separators=(",", ":")),
    }
    return write_tensors(path, masks(), possible=kinds.values(), metadata=metadata)


def open_masks(path: Path) -> MaskFile:
    """Read and check a mask file. Raises BadInput when it is none, truncated or damaged."""
    if not path.is_file():
        raise BadInput(f"--masks: no file {path}")
    header = read_header(path, flag="--masks")
    given = header.metadata
    if given.get("format") != _FORMAT or given.get("version") != _VERSION:
        raise BadInput(f"--masks: {path} is not of format {_FORMAT!r}, version {_VERSION}")
    try:
        shapes = {str(name): tuple(shape) for name, shape in json.loads(given["shapes"]).items()}
        checksums = json.loads(given[CHECKSUMS])
        sizes = {name: -(-math.prod(shape) // 8) for name, shape in shapes.items()}
        if sizes != {name: one.num_bytes for name, one in header.tensors.items()}:
            raise ValueError("sizes")
        damaged = [name for name, one in header.tensors.items() if checksum(read_bytes(one)) != checksums[name]]
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(f"--masks: {path} is damaged: its header does not describe masks") from error
    if damaged:
        raise BadInput(f"--masks: {path} is damaged: the mask of {damaged[0]} has another checksum")
    return MaskFile(bits=header.tensors, shapes=shapes, config=given.get("config", ""))


def check_masks(masks: MaskFile, checkpoint: Checkpoint) -> None:
    """Raise BadInput when the masks are not those of this model; warn when only its config.json differs."""
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
    """Zero weights of a copy of a checkpoint, in place, each tensor told to `advance`; the zeros in these tensors."""
    zeros = 0
    for name in masks.shapes:
        zeros += sum(zero_masked(written, written, {name: masks.mask(name)}).values())
        advance(name)
    return zeros
