"""Plug-ins by name: a file of this package, or `package.module:object` from anywhere; loaded when first used."""

import inspect
import pkgutil
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal, overload

from neuronal_ray.cli.errors import BadInput, did_you_mean, shown

if TYPE_CHECKING:  # the declarations import torch, which `--help` does not wait for
    from neuronal_ray.algorithms.declarations import Allocator, Method, Refinement, RowStep

_PACKAGE = Path(__file__).parent
_DECLARATIONS = "neuronal_ray.algorithms.declarations"
_OUTSIDE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*)?")
OUTSIDE_FORM = "package.module:object"


@dataclass(frozen=True)
class _Kind:
    """The flag that names plug-ins of a kind, the constant that a module declares, and the constant's class."""

    flag: str
    constant: str
    declaration: str


_KINDS = {
    "methods": _Kind("--method", "METHOD", "Method"),
    "allocations": _Kind("--allocation", "ALLOCATION", "Allocator"),
    "refinements": _Kind("--refinement", "REFINEMENT", "Refinement"),
    "rows": _Kind("--row-step", "ROW_STEP", "RowStep"),
}
"""By the folder that holds the plug-ins of this repository."""


def names(kind: str) -> list[str]:
    """Return the plug-ins of a kind that this package has, sorted; imports none of them."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_PACKAGE / kind)]))


def check_name(kind: str, name: str) -> None:
    """Raise BadInput unless `name` is a plug-in of this package or has the form of an outside one; imports nothing."""
    known = names(kind)
    if name in known or (_OUTSIDE.fullmatch(name) and ("." in name or ":" in name)):
        return
    near = did_you_mean(name, known)
    raise BadInput(
        f"{_KINDS[kind].flag}: unknown name {shown(name)}{near}, expected one of: {', '.join(known)}, or {OUTSIDE_FORM}"
    )


@overload
def load(kind: Literal["methods"], name: str) -> "Method": ...
@overload
def load(kind: Literal["allocations"], name: str) -> "Allocator": ...
@overload
def load(kind: Literal["refinements"], name: str) -> "Refinement": ...
@overload
def load(kind: Literal["rows"], name: str) -> "RowStep": ...
def load(kind: str, name: str) -> object:
    """Return the declaration of the plug-in `name`; of a module without `:object`, its METHOD, ALLOCATION and so on.

    Raises BadInput for an unknown name, a module that cannot be imported, and an object that is no declaration.
    """
    check_name(kind, name)
    flag, constant, declaration = _KINDS[kind].flag, _KINDS[kind].constant, _KINDS[kind].declaration
    if name in names(kind):
        return vars(import_module(f"neuronal_ray.algorithms.{kind}.{name}"))[constant]
    place, _, attribute = name.partition(":")
    expected = f"a {_DECLARATIONS}.{declaration} (docs/plugins.md)"
    try:
        members = vars(import_module(place))
    except (ImportError, TypeError) as error:  # TypeError: the module's own declaration lacks an argument
        last = traceback.extract_tb(error.__traceback__)[-1]
        raise BadInput(
            f"{flag}: {name}: {place} cannot be imported: {error} ({last.filename}:{last.lineno})"
        ) from error
    attribute = attribute or constant
    if attribute not in members:
        raise BadInput(f"{flag}: {name}: {place} has no {attribute}, expected {expected}")
    found = members[attribute]
    if not isinstance(found, vars(import_module(_DECLARATIONS))[declaration]):
        raise BadInput(f"{flag}: {name}: {attribute} is of type {type(found).__name__}, expected {expected}")
    return found


def settings_for(function: Callable[..., object], settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that are keyword-only arguments of `function`; integers become floats where it has those."""
    declared = arguments_of(function)
    return {
        name: float(value) if isinstance(declared[name].default, float) and isinstance(value, int) else value
        for name, value in settings.items()
        if name in declared
    }


def check_settings(functions: Sequence[Callable[..., object]], settings: Mapping[str, object], *, owner: str) -> None:
    """Raise BadInput unless every setting is a keyword-only argument of one of `functions`, of the right type."""
    known = {name: parameter for function in functions for name, parameter in arguments_of(function).items()}
    for name, value in settings.items():
        if name not in known:
            expected = ", ".join(f"{owner}.{key}" for key in known) or f"nothing: {owner} has no settings"
            raise BadInput(f"--set {owner}.{name}: unknown setting, expected {expected}")
        wanted = type(known[name].default)
        accepted = (int, float) if wanted is float else wanted
        if not isinstance(value, accepted) or isinstance(value, bool) is not (wanted is bool):
            raise BadInput(f"--set {owner}.{name}: {value!r} is not of type {wanted.__name__}")


def arguments_of(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only arguments of `function` that have a default, by name."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
