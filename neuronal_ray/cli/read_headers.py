"""The one reader of the headers of safetensors files: what each tensor is and where its bytes lie, or why it cannot be.

Nothing is believed: the tensors have to fill the file without holes, each with the bytes that its shape and dtype take.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, TypeGuard, TypeVar

from pydantic import Field

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import check_file, checked, parse_json

T = TypeVar("T")

Shape = tuple[Annotated[int, Field(ge=0)], ...]
"""A tensor's shape, as JSON has it."""

_LARGEST_BYTES = 100_000_000  # the limit of safetensors itself
_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits per number of the dtypes that safetensors files can have."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A tensor's name, shape and dtype, without its bytes; the dtype is safetensors' name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: path, byte range, shape, and safetensors' name of its dtype."""

    path: Path
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    def kind(self, name: str) -> Kind:
        """Return the tensor's description under `name`."""
        return Kind(name=name, dtype=self.dtype, shape=self.shape)


@dataclass(frozen=True, kw_only=True)
class Header:
    """The tensors and the metadata of one safetensors file."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]

    def check_format(self, path: Path, name: str, version: str, *, flag: str) -> None:
        """Raise BadInput unless the metadata of the file at `path` name this format and version."""
        if self.metadata.get("format") != name or self.metadata.get("version") != version:
            raise BadInput(f"{flag}: {path} is not of format {name!r}, version {version}")

    def entry(self, path: Path, key: str, kind: type[T], *, flag: str) -> T:
        """Return an entry of the metadata of the file at `path` that is JSON of the form `kind`."""
        place = f"{flag}: {path} is damaged: {key} in its header"
        if key not in self.metadata:
            raise BadInput(f"{place} is missing")
        return checked(parse_json(self.metadata[key], place=place), kind, place=place)


def read_header(path: Path, *, flag: str = "--model") -> Header:
    """Read the header of one safetensors file. Raises BadInput when it contradicts the format, itself or the file."""
    size = check_file(path, flag=flag)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise BadInput(f"{flag}: {path} is truncated or not a safetensors file")
        if length > _LARGEST_BYTES:
            raise BadInput(f"{flag}: {path} has a header of {length:,} bytes, expected at most {_LARGEST_BYTES:,}")
        text = file.read(length)
    place = f"{flag}: unreadable header of {path}"
    try:
        entries = parse_json(text.decode("utf-8"), place=place)
    except UnicodeDecodeError as error:
        raise BadInput(f"{place}: not UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(entries, dict):
        raise BadInput(f"{place}: expected an object with an entry per tensor")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInput(f"{place}: __metadata__ is not an object of strings")
    tensors = {name: _stored(path, 8 + length, entry, f"{place}: {name!r:.80}") for name, entry in entries.items()}
    _check_filled(tensors, 8 + length, size, place=f"{flag}: {path}")
    return Header(tensors=tensors, metadata=metadata)


def _stored(path: Path, data: int, entry: object, place: str) -> Stored:
    """Convert the entry of one tensor; the file's tensors begin at byte `data`."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise BadInput(f"{place}: expected an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise BadInput(f"{place}: unknown dtype {dtype!r:.40}, expected one of {', '.join(_BITS)}")
    if not _are_counts(shape):
        raise BadInput(f"{place}: shape {shape!r:.40} is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(f"{place}: data_offsets {offsets!r:.60} are not the begin and the end of a range of bytes")
    bits, (begin, end) = math.prod(shape) * _BITS[dtype], offsets
    if bits != 8 * (end - begin):
        raise BadInput(f"{place}: {dtype} {shape} takes {-(-bits // 8):,} bytes, its data_offsets span {end - begin:,}")
    return Stored(path=path, start=data + begin, stop=data + end, shape=tuple(shape), dtype=dtype)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_filled(tensors: dict[str, Stored], data: int, size: int, *, place: str) -> None:
    """Raise BadInput unless the tensors follow one another from byte `data` to the file's end."""
    listed = max((stored.stop for stored in tensors.values()), default=data)
    if listed != size:
        raise BadInput(f"{place} is truncated or damaged: {size:,} bytes, its header lists {listed:,}")
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop))
    if ordered and ordered[0][1].start != data:
        raise BadInput(f"{place} is damaged: no tensor has its first {ordered[0][1].start - data:,} bytes of data")
    for (name, before), (other, after) in pairwise(ordered):
        if before.stop != after.start:
            wrong = "overlap" if before.stop > after.start else "have a hole between them"
            raise BadInput(f"{place} is damaged: the bytes of {name!r:.80} and {other!r:.80} {wrong}")
