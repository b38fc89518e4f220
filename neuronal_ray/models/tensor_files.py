"""Safetensors files as bytes: where tensors lie, one read at a time, all written as they come, with checksums."""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuronal_ray.cli.errors import BadInput

CHECKSUMS = "crc32"
"""The key of a file's metadata under which its tensors' checksums lie, as JSON."""

WORD_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Bytes of a number of the dtypes that weights have."""

_FARTHEST = 10**15  # no offset in a file has more digits
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies: file, byte range, shape and the name that safetensors has for its dtype."""

    path: Path
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors of one safetensors file, and the words that came with them."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a tensor of a file is, its bytes aside."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """A tensor to be written: what it is, its bytes [bytes], and their checksum."""

    kind: Kind
    data: np.ndarray
    checksum: int


def read_header(path: Path, *, flag: str = "--model") -> Header:
    """What one safetensors file says of itself. Raises BadInput when it is not as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise BadInput(f"{flag}: {path} is truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
            metadata = {str(key): str(value) for key, value in (header.pop("__metadata__", None) or {}).items()}
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{flag}: {path} is not a safetensors file (unreadable header)") from error
    listed = max((stored.stop for stored in tensors.values()), default=8 + length)
    if listed != size:
        raise BadInput(f"{flag}: {path} is truncated or damaged: {size:,} bytes, its header lists {listed:,}")
    return Header(tensors=tensors, metadata=metadata)


def _stored(path: Path, data: int, entry: dict[str, list[int]]) -> Stored:
    """Where the tensor of one header entry lies in the file whose data begin at byte `data`."""
    start, stop = entry["data_offsets"]
    return Stored(
        path=path, start=data + start, stop=data + stop, shape=tuple(entry["shape"]), dtype=str(entry["dtype"])
    )


def read_bytes(stored: Stored, *, ahead: int = 0) -> np.ndarray:
    """The bytes of one tensor, [bytes], in memory of its own.

    So many `ahead`, behind them in the file, the system is to read on its own meanwhile, where it can be asked.
    """
    found = np.empty(stored.num_bytes, np.uint8)
    with stored.path.open("rb", buffering=0) as file:
        if ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), stored.start, stored.num_bytes + ahead, os.POSIX_FADV_WILLNEED)
        if not fill(file.fileno(), found, stored.start):
            raise BadInput(f"{stored.path} became shorter while it was read")
    return found


def fill(file: int, array: np.ndarray, offset: int) -> bool:
    """Read an array's bytes from `offset` of a file on; False when the file ends before."""
    left = array.view(np.uint8).data
    while left:  # one call reads 2 GiB at most
        count = os.preadv(file, [left], offset)
        if count == 0:
            return False
        left, offset = left[count:], offset + count
    return True


def checksum(data: np.ndarray) -> int:
    """CRC-32 of the bytes of an array: finds every change of up to 32 bits in a row, others but for one in 2**32."""
    return zlib.crc32(data.view(np.uint8).data)


def file_name(stem: str, number: int, count: int) -> str:
    """What the `number`th of `count` files is called, from 1."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def check_room(target: Path, num_bytes: int, *, flag: str) -> None:
    """Raise BadInput when the disk on which `target` is to appear has less room than that."""
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise BadInput(
            f"{flag}: the model's files take {num_bytes / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free; "
            "name a directory on a larger disk"
        )


def begin_file(path: Path, tensors: Iterable[tuple[Kind, int]]) -> int:
    """Make a file of its whole size for tensors of so many bytes, one after the other; returns where the first begins.

    Their bytes are not written yet.
    """
    placed, end = [], 0
    for kind, size in tensors:
        placed.append(_Placed(kind, end, end + size))
        end += size
    header = _encoded(placed, {"format": "pt"})
    start = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(start + end)
    return start


def write_tensors(path: Path, tensors: Iterable[Written], *, possible: Iterable[Kind], metadata: dict[str, str]) -> int:
    """Write one file as its tensors come; returns its size.

    `possible` are the tensors that may come, of these shapes or smaller ones: the header in front has room for all of
    them and is written at the end.
    Checksums join the metadata. A tensor begins at a multiple of 8 bytes if those before have such sizes.
    """
    farthest = [_Placed(kind, _FARTHEST, _FARTHEST) for kind in possible]
    room = len(_encoded(farthest, metadata | _checksums({place.kind.name: 2**32 for place in farthest})))
    placed: list[_Placed] = []
    sums: dict[str, int] = {}
    with path.open("wb") as file:
        file.seek(8 + room)
        offset = 0
        for tensor in tensors:
            placed.append(_Placed(tensor.kind, offset, offset + tensor.data.nbytes))
            sums[tensor.kind.name] = tensor.checksum
            offset += tensor.data.nbytes
            file.write(tensor.data.view(np.uint8).data)
        header = _encoded(placed, metadata | _checksums(sums))
        assert len(header) <= room, "a tensor came that was not possible"
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))
    return 8 + room + offset


@dataclass(frozen=True)
class _Placed:
    """Where a tensor goes."""

    kind: Kind
    begin: int
    end: int


def _checksums(sums: Mapping[str, int]) -> dict[str, str]:
    return {CHECKSUMS: json.dumps(sums, separators=(",", ":"))}


def _encoded(placed: Sequence[_Placed], metadata: Mapping[str, str]) -> bytes:
    """The header of tensors that go to these places, filled up with spaces to the alignment."""
    header: dict[str, object] = {"__metadata__": metadata}
    for place in placed:
        header[place.kind.name] = {
            "dtype": place.kind.dtype,
            "shape": list(place.kind.shape),
            "data_offsets": [place.begin, place.end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % _ALIGNMENT)
