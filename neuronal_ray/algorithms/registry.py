"""One file is one plug-in: methods, allocations and refinements found by the stem of their file, loaded when named."""

import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType

from neuronal_ray.cli.errors import BadInput

_PACKAGE = Path(__file__).parent


def names(kind: str) -> list[str]:
    """The plug-ins of a kind ("methods", "allocations", "refinements"), sorted; imports nothing."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_PACKAGE / kind)]))


def load(kind: str, name: str) -> ModuleType:
    """The module `neuronal_ray.<kind>.<name>`."""
    if name not in names(kind):
        raise BadInput(f"--{kind[:-1]}: unknown name {name!r}, expected one of: {', '.join(names(kind))}")
    return import_module(f"neuronal_ray.algorithms.{kind}.{name}")


def settings_for(function: Callable[..., object], settings: Mapping[str, object]) -> dict[str, object]:
    """The settings that are keyword-only arguments of `function`; an integer for a number is made one."""
    declared = _declared(function)
    return {
        name: float(value) if isinstance(declared[name].default, float) and isinstance(value, int) else value
        for name, value in settings.items()
        if name in declared
    }


def check_settings(functions: Sequence[Callable[..., object]], settings: Mapping[str, object], *, owner: str) -> None:
    """Raise BadInput unless every setting is a keyword-only argument of one of `functions`, of the right type."""
    known = {name: parameter for function in functions for name, parameter in _declared(function).items()}
    for name, value in settings.items():
        if name not in known:
            expected = ", ".join(f"{owner}.{key}" for key in known) or f"nothing: {owner} has no settings"
            raise BadInput(f"--set {owner}.{name}: unknown setting, expected {expected}")
        wanted = type(known[name].default)
        accepted = (int, float) if wanted is float else wanted
        if not isinstance(value, accepted) or isinstance(value, bool) is not (wanted is bool):
            raise BadInput(f"--set {owner}.{name}: {value!r} is not of type {wanted.__name__}")


def _declared(function: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The keyword-only arguments with a default."""
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.default is not parameter.empty
    }
