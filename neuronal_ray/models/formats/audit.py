"""Audit of a dense model directory: complete files, ordinary configuration, finite weights, and zeros per linear."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.models.fingerprints import read_raw_config
from neuronal_ray.models.output_files import stored_linears
from neuronal_ray.models.tensor_copies import count_zeros
from neuronal_ray.models.tensor_files import WORD_BYTES, read_bytes
from neuronal_ray.models.weight_files import read_index

_FOREIGN = ("neuronal", "prun", "sparsity", "sparsification", "quantization", "compression")
_EXPONENTS = {"F16": 0x7C00, "BF16": 0x7F80, "F32": 0x7F800000, "F64": 0x7FF0000000000000}
_SLICE = 2**20


@dataclass(frozen=True, kw_only=True)
class LinearZeros:
    """One stored tensor of a linear (or of stacked experts): its name, its shape and its number of zeros."""

    name: str
    shape: tuple[int, ...]
    zeros: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def audit(
    checkpoint: Checkpoint, *, advance: Callable[[str], None], trust_remote_code: bool = False
) -> list[LinearZeros]:
    """Read every tensor of a checkpoint and count the zeros of its linears; call `advance` with each tensor's name.

    Raises BadInput for an incomplete index, for keys in config.json that transformers does not write, and for numbers
    that are not finite.
    """
    _check_index(checkpoint)
    _check_config(checkpoint.path, checkpoint.config)
    names = stored_linears(checkpoint, trust_remote_code=trust_remote_code)
    zeros: dict[str, int] = {}
    for name, stored in checkpoint.tensors.items():
        data = read_bytes(stored)
        if stored.dtype in WORD_BYTES:
            words = data.view(f"u{WORD_BYTES[stored.dtype]}")
            zeros[name] = 0
            for start in range(0, len(words), _SLICE):
                piece = words[start : start + _SLICE]
                exponent = piece.dtype.type(_EXPONENTS[stored.dtype])
                if bool(np.any((piece & exponent) == exponent)):
                    raise BadInput(f"--model: {name} in {stored.path} has numbers that are not finite")
                zeros[name] += count_zeros(piece)
        advance(name)
    integers = [name for name in names if name not in zeros]
    if integers:
        raise BadInput(f"--model: {integers[0]} is stored as {checkpoint.tensors[integers[0]].dtype}, not as floats")
    return [LinearZeros(name=name, shape=checkpoint.tensors[name].shape, zeros=zeros[name]) for name in names]


def _check_index(checkpoint: Checkpoint) -> None:
    """Raise BadInput when the index does not list exactly the tensors of the files, each in its file."""
    path = checkpoint.index
    if path is None:
        return
    listed = {name: checkpoint.path / file for name, file in read_index(path, flag="--model").items()}
    stored = {name: tensor.path for name, tensor in checkpoint.tensors.items()}
    wrong = sorted(name for name in listed.keys() | stored.keys() if listed.get(name) != stored.get(name))
    if wrong:
        raise BadInput(f"--model: {path} and the files disagree about {len(wrong)} tensors, the first is {wrong[0]}")


def _check_config(path: Path, config: PretrainedConfig) -> None:
    """Raise BadInput for keys of config.json about sparsity or compression that the model family does not define."""
    own = {entry.name for entry in fields(type(config))}
    keys = read_raw_config(path).keys() - own
    foreign = sorted(key for key in keys if any(word in key.lower() for word in _FOREIGN))
    if foreign:
        raise BadInput(f"--model: config.json in {path} has keys that are not transformers': {', '.join(foreign)}")
