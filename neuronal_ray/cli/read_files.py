"""The one reader of small files that people write or edit: text, JSON, JSON lines' objects, TOML.

Whatever cannot be used becomes a BadInput with the flag, the file, the place in it and what was expected.
"""

import json
import math
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from neuronal_ray.cli.errors import BadInput

T = TypeVar("T")

_LARGEST_BYTES = 256 * 2**20
"""The most that a file read at once may have: the largest tokenizer.json has 35 MB."""
_LARGEST_INTEGER = 2**63 - 1
_SHOWN = 60
_NAME_BYTES, _PATH_BYTES = 255, 4095


def check_path(path: Path, *, flag: str) -> None:
    """Raise BadInput for a path that no file system can have: empty, with a NUL, or too long."""
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise BadInput(f"{flag}: {str(path)!r:.{_SHOWN}} is not a path: it has unpaired surrogates") from error
    if not encoded.strip():
        raise BadInput(f"{flag}: the path is blank, expected a name")
    if b"\0" in encoded:
        raise BadInput(f"{flag}: {str(path)!r:.{_SHOWN}} is not a path: it has a NUL")
    if len(encoded) > _PATH_BYTES or max(map(len, encoded.split(b"/"))) > _NAME_BYTES:
        raise BadInput(f"{flag}: {str(path)!r:.{_SHOWN}}... is too long for a file system")


def is_directory(path: Path, *, flag: str) -> bool:
    """Return whether there is a directory at `path`, through links. Raises BadInput where that cannot be seen."""
    status = _status(path, flag=flag)
    return status is not None and stat.S_ISDIR(status.st_mode)


def is_file(path: Path, *, flag: str) -> bool:
    """Return whether there is a regular file at `path`, through links. Raises BadInput where that cannot be seen."""
    status = _status(path, flag=flag)
    return status is not None and stat.S_ISREG(status.st_mode)


def _status(path: Path, *, flag: str) -> os.stat_result | None:
    """Return what the file system says of `path`, None where nothing is. Raises BadInput for anything else."""
    check_path(path, flag=flag)
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:  # no permission, a circle of links, a file in place of a directory
        raise BadInput(f"{flag}: cannot read {str(path)!r}: {error.strerror}") from error


def check_file(path: Path, *, flag: str) -> int:
    """Return the size of a regular file in bytes, through links. Raises BadInput for anything else at `path`."""
    status = _status(path, flag=flag)
    if status is None:
        what = "is a link to a file that does not exist" if path.is_symlink() else "does not exist, expected a file"
        raise BadInput(f"{flag}: {str(path)!r} {what}")
    if stat.S_ISDIR(status.st_mode):
        raise BadInput(f"{flag}: {str(path)!r} is a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for a writer
        raise BadInput(f"{flag}: {str(path)!r} is a device or a FIFO, expected a regular file")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{flag}: cannot read {str(path)!r}: Permission denied")
    return status.st_size


def read_bytes(path: Path, *, flag: str) -> bytes:
    """Read a small file. Raises BadInput if it cannot be read."""
    if (size := check_file(path, flag=flag)) > _LARGEST_BYTES:
        raise BadInput(f"{flag}: {str(path)!r} has {size:,} bytes, expected at most {_LARGEST_BYTES:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{flag}: cannot read {str(path)!r}: {error.strerror}") from error


def read_text(path: Path, *, flag: str) -> str:
    """Read a UTF-8 file as it is, line ends included. Raises BadInput if it cannot be read."""
    try:
        return read_bytes(path, flag=flag).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{flag}: {str(path)!r} is not UTF-8 text ({error})") from error


def read_json(path: Path, kind: type[T], *, flag: str) -> T:
    """Read a JSON file of this project, of the form `kind`: see `parse_json` and `checked`."""
    place = f"{flag}: {path}"
    return checked(parse_json(read_text(path, flag=flag), place=place), kind, place=place)


def parse_json(text: str | bytes, *, place: str) -> object:
    """Parse strict JSON: no duplicate keys, no unpaired surrogates, no numbers beyond 64 bits, NaN or infinity.

    Raises BadInput, beginning with `place`, for anything else.
    """

    def refuse(constant: str) -> NoReturn:
        raise BadInput(f"{place}: {constant} is not a JSON number")

    def whole(digits: str) -> int:
        if len(digits) > 20 or abs(int(digits)) > _LARGEST_INTEGER:
            raise BadInput(f"{place}: the number {digits:.{_SHOWN}} is beyond 64 bits")
        return int(digits)

    def real(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise BadInput(f"{place}: the number {digits:.{_SHOWN}} is beyond 64 bits")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise BadInput(f"{place}: the key {twice!r:.{_SHOWN}} is there twice")
        return entries

    try:
        value: object = json.loads(
            text, parse_constant=refuse, parse_int=whole, parse_float=real, object_pairs_hook=unique
        )
        if "\\u" in (text if isinstance(text, str) else text.decode("utf-8")):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except BadInput:
        raise
    except UnicodeEncodeError as error:
        raise BadInput(f"{place}: an unpaired surrogate is no character") from error
    except ValueError as error:
        raise BadInput(f"{place}: not JSON ({error})") from error
    except RecursionError as error:
        raise BadInput(f"{place}: nested too deeply") from error
    return value


def read_toml(path: Path, *, flag: str) -> dict[str, Any]:
    """Read a TOML file. Raises BadInput if it is not one."""
    text = read_text(path, flag=flag)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of thousands of digits
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BadInput(f"{flag}: {path} is not TOML: {reason}") from error


def checked(value: object, kind: type[T], *, place: str) -> T:
    """Return `value` as `kind`: a frozen dataclass (unknown keys are ignored), or as dict[str, list[int]].

    Nothing is converted but whole numbers to float, and lists to tuples. Raises BadInput, beginning with `place`, that
    says where in the value what is of another type.
    """
    try:
        # From JSON, because an array may become a tuple there.
        result: T = TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        more = f" (and {len(others)} more)" if others else ""
        raise BadInput(f"{place}: {_explained(first)}{more}") from error
    return result


def _explained(error: ErrorDetails) -> str:
    """Return one error of pydantic in words."""
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{where} is missing"
    given = "" if error["type"].startswith("json") else f"{error['input']!r:.{_SHOWN}}: "
    return f"{where}{': ' if where else ''}{given}{error['msg'][0].lower()}{error['msg'][1:]}"
