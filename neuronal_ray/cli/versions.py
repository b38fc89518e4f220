"""The versions that the numbers depend on."""

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from neuronal_ray import __version__

_PACKAGES = ("torch", "transformers", "datasets", "ray")


def versions() -> dict[str, str]:
    """What the numbers depend on, as far as it is installed: a run in one process needs no ray."""
    found = {"neuronal_ray": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
