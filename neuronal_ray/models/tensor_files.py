"""Safetensors files as bytes: reading and writing one tensor at a time, with checksums."""

import json
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import Kind, Stored

CHECKSUMS = "crc32"
"""The key of a file's metadata for its tensors' checksums, as JSON."""

WORD_BYTES = {"F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""Bytes per number, of the dtypes that weights have."""

FILE_BYTES = 4 * 2**30
"""The largest size of a written file, unless a single item is larger."""

_FARTHEST = 10**15  # no offset in a file has more digits
_ALIGNMENT = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Written:
    """A tensor to be written: its description, its bytes [bytes], and their checksum."""

    kind: Kind
    data: np.ndarray
    checksum: int

    @classmethod
    def of(cls, kind: Kind, data: np.ndarray) -> Self:
        """Compute the checksum of a tensor to be written."""
        return cls(kind=kind, data=data, checksum=checksum(data))


def read_bytes(stored: Stored, *, ahead: int = 0) -> np.ndarray:
    """Read the bytes of one tensor, [bytes], into new memory.

    The system prefetches the next `ahead` bytes of the file, where it supports that.
    """
    data = np.empty(stored.num_bytes, np.uint8)
    with stored.path.open("rb", buffering=0) as file:
        if ahead and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), stored.start, stored.num_bytes + ahead, os.POSIX_FADV_WILLNEED)
        if not fill(file.fileno(), data, stored.start):
            raise BadInput(f"{stored.path} became shorter while it was read")
    return data


def fill(file: int, array: np.ndarray, offset: int) -> bool:
    """Read an array's bytes from `offset` of an open file; return False when the file ends before."""
    left = array.view(np.uint8).data
    while left:  # one call reads 2 GiB at most
        count = os.preadv(file, [left], offset)
        if count == 0:
            return False
        left, offset = left[count:], offset + count
    return True


def checksum(data: np.ndarray) -> int:
    """Return the CRC-32 of an array's bytes: it detects all changes within 32 bits, others but for one in 2**32."""
    return zlib.crc32(data.view(np.uint8).data)


def file_name(stem: str, number: int, count: int) -> str:
    """Return the name of file `number` of `count`, counted from 1."""
    return f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05}-of-{count:05}.safetensors"


def consecutive_runs(sizes: Sequence[int], *, limit: int) -> list[range]:
    """Divide the positions of `sizes` into runs whose sizes sum to at most `limit`, or of one larger item."""
    runs, start, total = [], 0, 0
    for position, size in enumerate(sizes):
        if position > start and total + size > limit:
            runs.append(range(start, position))
            start, total = position, 0
        total += size
    return [*runs, range(start, len(sizes))] if sizes else []


def check_room(target: Path, num_bytes: int, *, flag: str) -> None:
    """Raise BadInput when the disk that `target` will be written to has less than `num_bytes` free."""
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise BadInput(
            f"{flag}: the model's files take {num_bytes / 2**30:.1f} GiB, {parent} has {free / 2**30:.1f} GiB free; "
            "name a directory on a larger disk"
        )


def begin_file(path: Path, tensors: Iterable[tuple[Kind, int]]) -> int:
    """Create a file of its final size for consecutive tensors, given with their bytes; return where the first begins.

    The tensors' bytes are not written.
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
    """Write one file from an iterator of its tensors; return its size.

    `possible` are the tensors that may come, of these shapes or smaller ones: the header, which precedes the tensors
    but is written last, has room for all of them. Checksums are added to the metadata. A tensor begins at a multiple
    of 8 bytes if the sizes of those before it are multiples of 8.
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
        assert len(header) <= room, "a tensor was not listed as possible"
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))
    return 8 + room + offset


@dataclass(frozen=True)
class _Placed:
    """A tensor and its byte range in a file's data."""

    kind: Kind
    begin: int
    end: int


def _checksums(sums: Mapping[str, int]) -> dict[str, str]:
    return {CHECKSUMS: json.dumps(sums, separators=(",", ":"))}


def _encoded(placed: Sequence[_Placed], metadata: Mapping[str, str]) -> bytes:
    """Return the header of the placed tensors, padded with spaces to the alignment."""
    header: dict[str, object] = {"__metadata__": metadata}
    for place in placed:
        header[place.kind.name] = {
            "dtype": place.kind.dtype,
            "shape": list(place.kind.shape),
            "data_offsets": [place.begin, place.end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    return encoded + b" " * (-len(encoded) % _ALIGNMENT)
