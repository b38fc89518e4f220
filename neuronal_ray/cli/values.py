"""Values of options, read from a word of the command line or from TOML, for every parser of this package.

A function raises ValueError with the reason for a word that it refuses; the caller adds the flag and the word.
"""

import math
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from neuronal_ray.cli.errors import BadInput, shown
from neuronal_ray.cli.read_files import check_path

_LARGEST = 2**63 - 1


def word(text: str) -> str:
    """Return a string as it is. Raises ValueError for one that is blank, or that no name or file can have."""
    if not text.strip():
        raise ValueError("is blank, expected a name")
    if "\0" in text:
        raise ValueError("has a NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("is not UTF-8 text") from error
    return text


def path(text: str) -> Path:
    """Read a path. Raises ValueError for one that no file system can have."""
    try:
        check_path(Path(word(text)), flag="")
    except BadInput as error:
        raise ValueError("is not a path: too long for a file system") from error
    return Path(text)


def integer(text: str) -> int:
    """Read an integer of 64 bits."""
    if len(text) > 100:  # Python reads no integers of more than 4,300 digits, and takes long for fewer
        raise ValueError("is beyond 64 bits")
    try:
        value = int(text)
    except ValueError as error:
        raise ValueError("is not an integer") from error
    if abs(value) > _LARGEST:
        raise ValueError("is beyond 64 bits")
    return value


def number(text: str) -> float:
    """Read a finite number."""
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError("is not a number") from error
    if not math.isfinite(value):
        raise ValueError("is not a finite number")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Read finite numbers separated by commas."""
    try:
        return tuple(number(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError("is not finite numbers separated by commas") from error


def names(text: str) -> tuple[str, ...]:
    """Read names separated by commas; `none` is no name."""
    if word(text).strip() == "none":
        return ()
    found = tuple(part.strip() for part in text.split(","))
    if "" in found:
        raise ValueError("has a blank name, expected names separated by commas")
    return found


def setting(text: str) -> tuple[str, object]:
    """Split OWNER.NAME=VALUE; the value is TOML, or else a plain string."""
    key, equals, value = text.partition("=")
    if not equals or not all(part.strip() for part in key.partition(".")):
        raise ValueError("is not KEY=VALUE, for example method.power=0.5")
    word(key)
    return key, setting_value(toml_value(value))


def toml_value(text: str) -> object:
    """Read one value in TOML's notation, or else a plain string. Raises ValueError for one nested too deeply."""
    try:
        table = tomllib.loads(f"value = {text}")
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except ValueError:  # no TOML, or an integer of thousands of digits
        return word(text)
    return table["value"] if len(table) == 1 else word(text)


def setting_value(value: object) -> object:
    """Return the value of a setting. Raises ValueError unless it is a string, a number, a switch or a list of them."""
    if isinstance(value, list):
        return [setting_value(item) for item in value]
    if isinstance(value, bool):
        return value
    if isinstance(value, str):
        return word(value) if value else value  # adaptive's `starts = ""`: none
    if isinstance(value, int):
        if abs(value) > _LARGEST:
            raise ValueError("is beyond 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("is not a finite number")
        return value
    raise ValueError("is neither a string, a number, true, false nor a list of these")


@dataclass(frozen=True)
class Kind:
    """How a kind of option is read from a word, and the types of TOML values and of their items that it accepts."""

    parse: Callable[[str], object]
    expected: str
    accepts: tuple[type, ...]
    items: tuple[type, ...] = ()

    def read(self, text: str, *, where: str) -> object:
        """Read a word. Raises BadInput, beginning with `where`, for one that is refused."""
        try:
            return self.parse(text)
        except ValueError as error:
            raise BadInput(f"{where}: {shown(text)} {error}") from error


KINDS = {
    "str": Kind(word, "a string", (str,)),
    "int": Kind(integer, "an integer", (int,)),
    "float": Kind(number, "a number", (int, float)),
    "path": Kind(path, "a path", (str,)),
    "numbers": Kind(numbers, "numbers separated by commas", (list,), (int, float)),
    "names": Kind(names, "names separated by commas", (list, str), (str,)),
    "settings": Kind(setting, "KEY=VALUE, for example method.power=0.5", (dict,)),
    "switch": Kind(str, "true or false", (bool,)),
}
