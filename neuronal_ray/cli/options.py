"""Options of a command: the fields of a frozen dataclass, each annotated with an Option, read from flags and TOML.

Errors name the flag.
"""

import argparse
import difflib
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_type_hints

from neuronal_ray.cli.errors import BadInput


class Options(Protocol):
    """A dataclass of options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        ...

    def warn_of_ignored(self) -> None:
        """Warn of options that have no effect given the others."""
        ...


AnyOptions = TypeVar("AnyOptions", bound=Options)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(_number(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(part.strip() for part in text.split(",") if part.strip())


def _setting(text: str) -> tuple[str, object]:
    """Split KEY=VALUE; the value is TOML, or else a plain string."""
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ValueError(text)
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


@dataclass(frozen=True)
class _Kind:
    """How a kind of option is read from a word, and the types of TOML values and of their items that it accepts."""

    parse: Callable[[str], object]
    expected: str
    accepts: tuple[type, ...]
    items: tuple[type, ...] = ()


_KINDS = {
    "str": _Kind(str, "a string", (str,)),
    "int": _Kind(int, "an integer", (int,)),
    "float": _Kind(_number, "a number", (int, float)),
    "path": _Kind(Path, "a path", (str,)),
    "numbers": _Kind(_numbers, "numbers separated by commas", (list,), (int, float)),
    "names": _Kind(_names, "names separated by commas", (list, str), (str,)),
    "settings": _Kind(_setting, "KEY=VALUE, for example method.power=0.5", (dict,)),
    "switch": _Kind(str, "true or false", (bool,)),
}


@dataclass(frozen=True)
class Option:
    """The annotation that makes a dataclass field a command-line option; `kind` is a key of `_KINDS`."""

    kind: str
    help: str
    choices: tuple[str, ...] = ()


class _Parser(argparse.ArgumentParser):
    """argparse with errors on one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message.removeprefix('argument ')} (see --help)\n")


def parse_config(kind: type[AnyOptions], argv: Sequence[str], *, prog: str, description: str) -> AnyOptions:
    """Return the configuration of `argv`: flags over `--config FILE` over defaults. Raises BadInput naming the flag."""
    parser = _Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with any of these options, without the dashes in front"
    )
    options = options_of(kind)
    defaults = {entry.name: entry.default for entry in fields(kind) if entry.default is not MISSING}
    for name, declared in options.items():
        _add_option(parser, name, declared, default=defaults.get(name))
    given = vars(parser.parse_args(argv))
    path = given.pop("config", None)
    values: dict[str, Any] = {} if path is None else _read_toml(path, options)
    if "settings" in given:
        given["settings"] = values.get("settings", {}) | dict(given["settings"])
    values |= given
    for entry in fields(kind):
        if _is_required(entry) and entry.name not in values:
            raise BadInput(f"{flag_of(entry.name)}: missing (see --help)")
    config = kind(**values)
    config.check()
    config.warn_of_ignored()
    return config


def options_of(kind: type[Options]) -> dict[str, Option]:
    """Return the options of a configuration by the names of its fields."""
    hints = get_type_hints(kind, include_extras=True)
    return {entry.name: hints[entry.name].__metadata__[0] for entry in fields(kind)}


def flag_of(name: str) -> str:
    """Return the flag of an option."""
    return "--set" if name == "settings" else "--" + name.replace("_", "-")


def _is_required(entry: Field[object]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


def _add_option(parser: argparse.ArgumentParser, name: str, option: Option, *, default: object) -> None:
    kind, choices, help_text = option.kind, option.choices, option.help
    if kind == "switch":
        parser.add_argument(flag_of(name), dest=name, action="store_true", help=help_text)
        return
    if default is not None:
        help_text += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
    metavar = {
        "int": "N",
        "float": "X",
        "path": "PATH",
        "numbers": "X,X,...",
        "names": "NAME,...",
        "settings": "KEY=VALUE",
    }
    parser.add_argument(
        flag_of(name),
        dest=name,
        type=_parser_of(kind),
        action="append" if kind == "settings" else "store",
        metavar="{" + ",".join(choices) + "}" if choices else metavar.get(kind, name.upper()),
        choices=choices or None,
        help=help_text,
    )


def _parser_of(kind: str) -> Callable[[str], object]:
    def parse(text: str) -> object:
        try:
            return _KINDS[kind].parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {_KINDS[kind].expected}") from error

    return parse


def _read_toml(path: Path, options: Mapping[str, Option]) -> dict[str, object]:
    """Read a TOML file of options: keys are flags without the dashes in front, `[set.method]` tables are settings."""
    try:
        table = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"--config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"--config: {path} is not TOML: {error}") from error
    return read_options(table, options, flag="--config", place=str(path))


def read_options(
    table: Mapping[str, object], options: Mapping[str, Option], *, flag: str, place: str
) -> dict[str, Any]:
    """Return the values of a TOML table by the options' names. Raises BadInput with flag and place for unknown keys."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = option_name(key, options, flag=flag, place=place)
        values[name] = option_value(value, options[name], where=f"{flag}: {key} in {place}")
    return values


def option_name(key: str, options: Mapping[str, Option], *, flag: str, place: str) -> str:
    """Return the name of the option that a TOML key stands for."""
    name = "settings" if key == "set" else key.replace("-", "_")
    if name not in options:
        known = [flag_of(known)[2:] for known in options]
        near = difflib.get_close_matches(key, known, n=3)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise BadInput(f"{flag}: unknown key {key!r} in {place}{hint}, expected one of: {', '.join(known)}")
    return name


def option_value(value: object, option: Option, *, where: str) -> object:
    """Convert a TOML value to the option's type. Raises BadInput, beginning with `where`, for one of another type."""
    kind = _KINDS[option.kind]
    if not _is_a(value, kind.accepts) or (isinstance(value, list) and not all(_is_a(x, kind.items) for x in value)):
        raise BadInput(f"{where}: {value!r} is not {kind.expected}")
    if isinstance(value, dict):
        if not all(isinstance(table, dict) for table in value.values()):
            raise BadInput(f"{where}: expected tables, for example [set.method]")
        return {f"{owner}.{name}": item for owner, table in value.items() for name, item in table.items()}
    if option.choices and value not in option.choices:
        raise BadInput(f"{where}: {value!r} is not one of: {', '.join(option.choices)}")
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and option.kind == "names":
        return tuple(value)  # a name in a list may hold a comma
    try:
        return kind.parse(",".join(map(str, value)) if isinstance(value, list) else str(value))
    except ValueError as error:
        raise BadInput(f"{where}: {value!r} is not {kind.expected}") from error


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    """Do what `isinstance` does, but True and False are no numbers."""
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
