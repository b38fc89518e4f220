"""neuronal_ray: prune large language models to 60-80 % unstructured sparsity without re-training."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LOADERS = {
    "load_packed": "neuronal_ray.models.formats.packed_loading",
    "load_semi_structured": "neuronal_ray.models.formats.semi_structured",
    "pack_linears": "neuronal_ray.models.formats.packed_linear",
}
"""The functions of the package itself, by the modules that are imported at their first use."""


def __getattr__(name: str) -> Callable[..., Any]:
    if name not in _LOADERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    loader: Callable[..., Any] = vars(import_module(_LOADERS[name]))[name]
    return loader
