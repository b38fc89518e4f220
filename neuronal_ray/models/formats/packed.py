"""The packed format: a checkpoint's sparse tensors as a bit per weight and the values that are not zero.

Each safetensors file of the checkpoint becomes one, `NAME.bits` and `NAME.values` in place of a tensor NAME for which
that is smaller. Bits are those of core/packing.py. Every tensor comes back bit for bit, negative zeros included: they
are values.
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
from neuronal_ray.core.packing import pack_words
from neuronal_ray.models.checkpoint import DTYPES, Checkpoint, read_config
from neuronal_ray.models.fingerprints import config_fingerprint, tensors_fingerprint, weights_fingerprint
from neuronal_ray.models.tensor_files import (
    CHECKSUMS,
    WORD_BYTES,
    Kind,
    Stored,
    Written,
    checksum,
    file_name,
    read_bytes,
    read_header,
    write_tensors,
)

_FORMAT, _VERSION = "neuronal_ray packed", "1"
WHO = "load_packed"
_THREADS = min(4, os.cpu_count() or 1)  # reading a disk does not gain from more
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class PackedTensor:
    """One tensor of the model as it lies in a packed file; `bits` is None for one stored as it was."""

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
        """Bytes of the tensor itself."""
        return self.size * WORD_BYTES[self.values.dtype] if self.bits is not None else self.values.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.values.num_bytes + (0 if self.bits is None else self.bits.num_bytes)

    @property
    def least_bytes(self) -> int:
        """Bytes that a bit per weight and the values take, with nothing between them."""
        return self.values.num_bytes + (0 if self.bits is None else -(-self.size // 8))


@dataclass(frozen=True, kw_only=True)
class PackedModel:
    """A directory of packed files that have been found complete, and to be those of its config.json."""

    path: Path
    config: PretrainedConfig
    tensors: dict[str, PackedTensor]
    files: list[Path]


def packed_bytes(size: int, kept: int, word: int) -> int:
    """Bytes of a packed tensor of `size` weights of `word` bytes, `kept` of them with a value: bits and values.

    The bits are filled up so that the whole is a multiple of 8 bytes and the values begin at a multiple of `word`.
    """
    least = -(-size // 8) + word * kept
    return least + -least % _ALIGNMENT


# -- writing


def write_packed(checkpoint: Checkpoint, target: Path, *, advance: Callable[[str], None]) -> None:
    """Write the packed files of a checkpoint into `target`, a few tensors in memory at a time.

    `advance` is told the name of each file written. Raises BadInput for names that packing would make ambiguous.
    """
    for name in checkpoint.tensors:
        if f"{name}.bits" in checkpoint.tensors or f"{name}.values" in checkpoint.tensors:
            raise BadInput(f"--model: {name} cannot be packed: {name}.bits or {name}.values is a tensor as well")
    identity = {
        "format": _FORMAT,
        "version": _VERSION,
        "config": config_fingerprint(checkpoint.path),
        "tensors": tensors_fingerprint(_kind(name, stored) for name, stored in checkpoint.tensors.items()),
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


def _kind(name: str, stored: Stored) -> Kind:
    return Kind(name=name, dtype=stored.dtype, shape=stored.shape)


def _possible(name: str, stored: Stored) -> list[Kind]:
    """What may become of a tensor."""
    size = math.prod(stored.shape)
    return [
        _kind(name, stored),
        Kind(name=f"{name}.bits", dtype="U8", shape=(size,)),
        Kind(name=f"{name}.values", dtype=stored.dtype, shape=(size,)),
    ]


def _packed(tensors: Mapping[str, Stored]) -> Iterator[Written]:
    """The tensors packed where it pays, in their order, some threads ahead of who writes them."""
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
                _written(Kind(name=f"{name}.bits", dtype="U8", shape=bits.shape), bits),
                _written(Kind(name=f"{name}.values", dtype=stored.dtype, shape=values.shape), values),
            ]
    return [_written(_kind(name, stored), data)]


def _written(kind: Kind, data: np.ndarray) -> Written:
    return Written(kind=kind, data=data, checksum=checksum(data))


# -- reading


def open_packed(path: Path, *, trust_remote_code: bool = False) -> PackedModel:
    """Check a packed directory without reading values: headers, sizes, whose files they are, the number of bits set.

    Raises BadInput for what is missing, truncated, of another model or damaged in its bits.
    """
    files = sorted(path.glob("packed*.safetensors"))
    if not files:
        raise BadInput(f"{WHO}: no packed.safetensors in {path}, expected what `export --format packed` wrote")
    config = read_config(path, trust_remote_code=trust_remote_code)
    tensors: dict[str, PackedTensor] = {}
    wanted: dict[str, str] = {}
    for file in files:
        header = read_header(file, flag=WHO)
        given = header.metadata
        if given.get("format") != _FORMAT or given.get("version") != _VERSION:
            raise BadInput(f"{WHO}: {file} is not of format {_FORMAT!r}, version {_VERSION}")
        if given.get("config") != config_fingerprint(path):
            raise BadInput(f"{WHO}: {file} was packed from a model with another config.json than {path} has")
        whose = {key: given.get(key, "") for key in ("tensors", "weights")}
        wanted = wanted or whose
        if whose != wanted:
            raise BadInput(f"{WHO}: {file} is of another model than {files[0]}")
        try:
            shapes, checksums = json.loads(given["shapes"]), json.loads(given[CHECKSUMS])
            for name, shape in shapes.items():
                tensors[name] = _found(name, tuple(shape), header.tensors, checksums)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{WHO}: {file} is damaged: its header does not describe a packed model") from error
    found = [Kind(name=name, dtype=one.values.dtype, shape=one.shape) for name, one in tensors.items()]
    if tensors_fingerprint(found) != wanted["tensors"]:
        raise BadInput(f"{WHO}: {path} is incomplete: its files do not have all tensors of the model")
    for name, one in tensors.items():
        _check_bits(name, one)
    return PackedModel(path=path, config=config, tensors=tensors, files=files)


def _found(
    name: str, shape: tuple[int, ...], stored: Mapping[str, Stored], checksums: Mapping[str, int]
) -> PackedTensor:
    """Where a tensor of the model lies in a file. Raises KeyError or BadInput when the header contradicts itself."""
    if name in stored:
        one = PackedTensor(shape=shape, bits=None, values=stored[name], checksums={"values": checksums[name]})
        consistent = stored[name].shape == shape
    else:
        bits, values = stored[f"{name}.bits"], stored[f"{name}.values"]
        sums = {"bits": checksums[f"{name}.bits"], "values": checksums[f"{name}.values"]}
        one = PackedTensor(shape=shape, bits=bits, values=values, checksums=sums)
        word = WORD_BYTES[values.dtype]
        consistent = values.num_bytes == one.kept * word and one.num_bytes == packed_bytes(one.size, one.kept, word)
    if not consistent or one.values.dtype not in DTYPES:
        raise ValueError(name)
    return one


def _check_bits(name: str, tensor: PackedTensor) -> None:
    """Raise BadInput when there are not as many bits as values."""
    if tensor.bits is not None:
        count = int(np.bitwise_count(read_bytes(tensor.bits)).sum(dtype=np.int64))
        if count != tensor.kept:
            raise BadInput(
                f"{WHO}: {tensor.bits.path} is damaged: {name} has {count:,} bits for {tensor.kept:,} values"
            )
