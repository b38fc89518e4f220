"""Options of a command: the fields of a frozen dataclass, each annotated with an Option, read from flags and TOML.

Errors name the flag.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, get_type_hints

from neuronal_ray.cli.errors import BadInput, did_you_mean, shown
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.read_files import read_toml
from neuronal_ray.cli.values import KINDS, setting, setting_value


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


@dataclass(frozen=True)
class Option:
    """The annotation that makes a dataclass field a command-line option; `kind` is a key of `KINDS`.

    `least` and `most` bound a number.
    """

    kind: str
    help: str
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int | None = None


def parse_config(kind: type[AnyOptions], argv: Sequence[str], *, prog: str, description: str) -> AnyOptions:
    """Return the configuration of `argv`: flags over `--config FILE` over defaults. Raises BadInput naming the flag."""
    parser = Parser(prog=prog, description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file with any of these options, without the dashes in front"
    )
    options = options_of(kind)
    defaults = {entry.name: entry.default for entry in fields(kind) if entry.default is not MISSING}
    for name, declared in options.items():
        _add_option(parser, name, declared, default=defaults.get(name))
    given = vars(parser.parse_known_args(argv)[0])
    path: Path | None = given.pop("config", None)
    given = {name: _given_value(name, word, options[name]) for name, word in given.items()}
    values: dict[str, Any] = {}
    if path is not None:
        values = read_options(read_toml(path, flag="--config"), options, flag="--config", place=str(path))
    in_file = values.keys() - given.keys()
    if "settings" in given:
        given["settings"] = values.get("settings", {}) | given["settings"]
    values |= given
    for entry in fields(kind):
        if _is_required(entry) and entry.name not in values:
            raise BadInput(f"{flag_of(entry.name)}: missing (see --help)")
    config = kind(**values)
    try:
        config.check()
    except BadInput as error:
        if str(error).partition(":")[0] in map(flag_of, in_file):
            raise BadInput(f"{error} (in {path})") from error
        raise
    parser.warn_of_repeated()
    config.warn_of_ignored()
    return config


def check_bounds(config: Options) -> None:
    """Raise BadInput, naming the flag, for a number outside the bounds of its option."""
    for name, option in options_of(type(config)).items():
        value = getattr(config, name)
        if option.kind not in ("int", "float") or value is None:
            continue
        if option.least is not None and value < option.least:
            raise BadInput(f"{flag_of(name)}: {value} is too small, expected at least {option.least}")
        if option.most is not None and value > option.most:
            raise BadInput(f"{flag_of(name)}: {value} is too large, expected at most {option.most}")


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
        type=str,
        action="append" if kind == "settings" else "store",
        metavar="{" + ",".join(choices) + "}" if choices else metavar.get(kind, name.upper()),
        help=help_text,
    )


def _given_value(name: str, word: Any, option: Option) -> object:
    """Return the value of what argparse took from the command line: a word, a switch, or the words of --set."""
    if isinstance(word, bool):
        return word
    if option.kind == "settings":
        return dict(_setting(each) for each in word)
    value = KINDS[option.kind].read(word, where=flag_of(name))
    _check_choice(value, option, where=flag_of(name))
    return value


def _setting(word: str) -> tuple[str, object]:
    try:
        return setting(word)
    except ValueError as error:
        raise BadInput(f"--set: {shown(word)} {error}") from error


def _check_choice(value: object, option: Option, *, where: str) -> None:
    if option.choices and value not in option.choices:
        near = did_you_mean(str(value), option.choices)
        raise BadInput(f"{where}: {shown(value)} is not one of: {', '.join(option.choices)}{near}")


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
        hint = did_you_mean(key, known)
        raise BadInput(f"{flag}: unknown key {shown(key)} in {place}{hint}, expected one of: {', '.join(known)}")
    return name


def option_value(value: object, option: Option, *, where: str) -> object:
    """Convert a TOML value to the option's type. Raises BadInput, beginning with `where`, for one of another type."""
    kind = KINDS[option.kind]
    if not _is_a(value, kind.accepts) or (isinstance(value, list) and not all(_is_a(x, kind.items) for x in value)):
        raise BadInput(f"{where}: {shown(value)} is not {kind.expected}")
    if isinstance(value, dict):
        return _settings_of(value, where=where)
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and option.kind == "names":  # a name in a list may hold a comma
        return tuple(KINDS["str"].read(name, where=where) for name in value)
    if isinstance(value, list):
        return tuple(KINDS["float"].read(_written(item), where=where) for item in value)
    read = kind.read(_written(value), where=where)
    _check_choice(read, option, where=where)
    return read


def _written(value: object) -> str:
    """Return a TOML value as a word."""
    try:
        return str(value)
    except ValueError:  # an integer of thousands of digits
        return shown(value)


def _settings_of(tables: Mapping[str, object], *, where: str) -> dict[str, object]:
    """Return the settings of `[set.OWNER]` tables by OWNER.NAME."""
    settings = {}
    for owner, table in tables.items():
        if not isinstance(table, dict):
            raise BadInput(f"{where}: expected tables, for example [set.method]")
        for name, value in table.items():
            try:
                settings[f"{owner}.{name}"] = setting_value(value)
            except ValueError as error:
                raise BadInput(f"{where}: {shown(name)}: {shown(value)} {error}") from error
    return settings


def _is_a(value: object, types: tuple[type, ...]) -> bool:
    """Do what `isinstance` does, but True and False are no numbers."""
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
