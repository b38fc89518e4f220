"""The packed format: each sparse tensor of a checkpoint as one bit per weight and the values that are not zero.

Each safetensors file of the checkpoint becomes one packed file. A tensor NAME is replaced by `NAME.bits` (as in
core/packing.py) and `NAME.values` if they are smaller. Every tensor is restored bit for bit; a negative zero counts as
a value.
"""

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PretrainedConfig

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import Kind, Shape, Stored, read_header
from neuronal_ray.core.packing import pack_words
from neuronal_ray.models.checkpoint import DTYPES, Checkpoint, read_config
from neuronal_ray.models.fingerprints import config_fingerprint, tensors_fingerprint, weights_fingerprint
from neuronal_ray.models.tensor_copies import count_zeros
from neuronal_ray.models.tensor_files import (
    CHECKSUMS,
    WORD_BYTES,
    Written,
    checksum,
    file_name,
    read_bytes,
    write_tensors,
)

_FORMAT, _VERSION = "neuronal_ray packed", "1"
READER = "load_packed"
"""The function that users call, named in errors in place of a flag."""
_THREADS = min(4, os.cpu_count() or 1)  # more threads do not read a disk faster
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One tensor of the model in a packed file; `bits` is None for a tensor stored unpacked."""

    shape: tuple[int, ...]
    bits: Stored | None
    values: Stored
    checksums: Mapping[str, int]

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """Number of weights that have a value."""
        return math.prod(self.values.shape)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the unpacked tensor."""
        return self.size * WORD_BYTES[self.values.dtype] if self.bits is not None else self.values.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.values.num_bytes + (0 if self.bits is None else self.bits.num_bytes)

    def zeros(self) -> int:
        """Count the weights that are zero, of either sign, in the file. Raises BadInput when it is damaged."""
        data = read_bytes(self.values)
        if checksum(data) != self.checksums["values"]:
            raise BadInput(f"{READER}: {self.values.path} is damaged: its values have another checksum")
        return self.size - self.kept + count_zeros(data.view(f"u{WORD_BYTES[self.values.dtype]}"))

    @property
    def least_bytes(self) -> int:
        """Bytes of the bits and the values without padding."""
        return self.values.num_bytes + (0 if self.bits is None else -(-self.size // 8))


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A directory of packed files that are complete and belong to its config.json."""

    path: Path
    config: PretrainedConfig
    tensors: dict[str, PackedTensor]
    files: list[Path]


def packed_bytes(size: int, kept: int, word: int) -> int:
    """Return the bytes of a packed tensor of `size` weights of `word` bytes, `kept` of them with a value.

    The bits are padded so that the total is a multiple of 8 bytes and the values begin at a multiple of `word`.
    """
    least = -(-size // 8) + word * kept
    return least + -least % _ALIGNMENT


def write_packed(checkpoint: Checkpoint, target: Path, *, advance: Callable[[str], None]) -> None:
    """Write the packed files of a checkpoint to `target`, with a few tensors in memory at a time.

    Calls `advance` with the name of each file. Raises BadInput for tensor names that packing would make ambiguous.
    """
    for name in checkpoint.tensors:
        if f"{name}.bits" in checkpoint.tensors or f"{name}.values" in checkpoint.tensors:
            raise BadInput(f"--model: {name} cannot be packed: {name}.bits or {name}.values is a tensor as well")
    identity = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": config_fingerprint(checkpoint.path),
        "tensors": tensors_fingerprint(stored.kind(name) for name, stored in checkpoint.tensors.items()),
        "weights": weights_fingerprint(checkpoint.tensors),
    }
    for number, file in enumerate(checkpoint.files, start=1):
        tensors = {name: stored for name, stored in checkpoint.tensors.items() if stored.path == file}
        shapes = json.dumps({name: stored.shape for name, stored in tensors.items()}, separators=(",", ":"))
        name = file_name("packed", number, len(checkpoint.files))
        write_tensors(
            target / name,
            _packed(tensors),
            possible=[kind for name, stored in tensors.items() for kind in _possible(name, stored)],
            metadata=identity | {"shapes": shapes},
        )
        advance(name)


def _possible(name: str, stored: Stored) -> list[Kind]:
    """Return all tensors that packing may write for one tensor."""
    size = math.prod(stored.shape)
    return [
        stored.kind(name),
        Kind(name=f"{name}.bits", dtype="U8", shape=(size,)),
        Kind(name=f"{name}.values", dtype=stored.dtype, shape=(size,)),
    ]


def _packed(tensors: Mapping[str, Stored]) -> Iterator[Written]:
    """Yield the tensors in order, packed where that is smaller; threads work ahead of the caller."""
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: deque[Future[list[Written]]] = deque()
        for name, stored in tensors.items():
            ahead.append(pool.submit(_pack_one, name, stored))
            if len(ahead) > _THREADS:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _pack_one(name: str, stored: Stored) -> list[Written]:
    data = read_bytes(stored)
    if stored.dtype in WORD_BYTES:
        word = WORD_BYTES[stored.dtype]
        words = data.view(f"u{word}")
        whole = packed_bytes(len(words), int(np.count_nonzero(words)), word)
        if whole < data.nbytes:
            bits, values = pack_words(words)
            bits = np.concatenate([bits, np.zeros(whole - bits.nbytes - values.nbytes, np.uint8)])
            return [
                Written.of(Kind(name=f"{name}.bits", dtype="U8", shape=bits.shape), bits),
                Written.of(Kind(name=f"{name}.values", dtype=stored.dtype, shape=values.shape), values),
            ]
    return [Written.of(stored.kind(name), data)]


def open_packed(path: Path, *, trust_remote_code: bool = False) -> PackedModel:
    """Open a packed directory and check headers, sizes, fingerprints and the numbers of bits, without reading values.

    Raises BadInput for files that are missing, truncated, of another model, or damaged in their bits.
    """
    files = sorted(path.glob("packed*.safetensors"))
    if not files:
        raise BadInput(f"{READER}: no packed.safetensors in {path}, expected what `export --format packed` wrote")
    config = read_config(path, trust_remote_code=trust_remote_code)
    tensors: dict[str, PackedTensor] = {}
    expected: dict[str, str] = {}
    for file in files:
        header = read_header(file, flag=READER)
        header.check_format(file, _FORMAT, _VERSION, flag=READER)
        given = header.metadata
        if given.get("config") != config_fingerprint(path):
            raise BadInput(f"{READER}: {file} was packed from a model with another config.json than {path} has")
        fingerprints = {key: given.get(key, "") for key in ("tensors", "weights")}
        expected = expected or fingerprints
        if fingerprints != expected:
            raise BadInput(f"{READER}: {file} is of another model than {files[0]}")
        shapes = header.entry(file, "shapes", dict[str, Shape], flag=READER)
        checksums = header.entry(file, CHECKSUMS, dict[str, int], flag=READER)
        try:
            for name, shape in shapes.items():
                tensors[name] = _packed_tensor(name, shape, header.tensors, checksums)
        except (KeyError, ValueError) as error:
            raise BadInput(f"{READER}: {file} is damaged: its header does not describe a packed model") from error
    kinds = [Kind(name=name, dtype=packed.values.dtype, shape=packed.shape) for name, packed in tensors.items()]
    if tensors_fingerprint(kinds) != expected["tensors"]:
        raise BadInput(f"{READER}: {path} is incomplete: its files do not have all tensors of the model")
    for name, packed in tensors.items():
        _check_bits(name, packed)
    return PackedModel(path=path, config=config, tensors=tensors, files=files)


def _packed_tensor(
    name: str, shape: tuple[int, ...], stored: Mapping[str, Stored], checksums: Mapping[str, int]
) -> PackedTensor:
    """Look up a tensor of the model in a file. Raises KeyError or ValueError when the header contradicts itself."""
    if name in stored:
        packed = PackedTensor(shape=shape, bits=None, values=stored[name], checksums={"values": checksums[name]})
        consistent = stored[name].shape == shape
    else:
        bits, values = stored[f"{name}.bits"], stored[f"{name}.values"]
        sums = {"bits": checksums[f"{name}.bits"], "values": checksums[f"{name}.values"]}
        packed = PackedTensor(shape=shape, bits=bits, values=values, checksums=sums)
        word, kept = WORD_BYTES[values.dtype], packed.kept
        consistent = values.num_bytes == kept * word and packed.num_bytes == packed_bytes(packed.size, kept, word)
    if not consistent or packed.values.dtype not in DTYPES:
        raise ValueError(name)
    return packed


def _check_bits(name: str, tensor: PackedTensor) -> None:
    """Raise BadInput when the number of set bits is not the number of values."""
    if tensor.bits is not None:
        count = int(np.bitwise_count(read_bytes(tensor.bits)).sum(dtype=np.int64))
        if count != tensor.kept:
            raise BadInput(
                f"{READER}: {tensor.bits.path} is damaged: {name} has {count:,} bits for {tensor.kept:,} values"
            )
