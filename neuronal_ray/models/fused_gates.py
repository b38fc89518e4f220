"""An activation that waits for its product: `act(gates) * values` by one kernel, in whatever module it is written.

Modules write the two apart. What the activation returns here is not computed until something is done with it: a product
takes the kernel if there is one for it; all else has the tensor that the activation would have returned.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronal_ray.core.kernels.gate import gated
from neuronal_ray.core.kernels.gate import takes as gate_takes

_PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.__mul__, Tensor.__rmul__}
_OPERATORS = (
    *("__add__", "__radd__", "__sub__", "__rsub__", "__truediv__", "__rtruediv__", "__pow__", "__rpow__"),
    *("__matmul__", "__rmatmul__", "__neg__", "__getitem__", "__len__", "__iter__"),
)
"""What Python asks of a class and not of its instance; a tensor's others are found by name."""


@torch.no_grad()
def is_silu(module: nn.Module) -> bool:
    """Return whether a module without weights of its own is `silu`, of its values on some inputs."""
    if [*module.parameters(), *module.buffers(), *module.children()]:
        return False
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.linspace(-8, 8, 1001).to(dtype)
        try:
            found = module(inputs)
        except (RuntimeError, TypeError, ValueError):  # it takes something else
            return False
        if not isinstance(found, Tensor) or found.dtype != dtype or not torch.equal(found, F.silu(inputs)):
            return False
    return True


class Waiting:
    """silu(gates), once something is done with it; `torch` functions take it for a tensor."""

    def __init__(self, gates: Tensor) -> None:
        self._gates = gates
        self._made: Tensor | None = None

    def made(self) -> Tensor:
        """The tensor."""
        if self._made is None:
            self._made = F.silu(self._gates)
        return self._made

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Tensor) and gate_takes(self._gates, other):
            return gated(self._gates, other)
        return self.made() * other

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            one, other = args if isinstance(args[0], cls) else reversed(args)
            if not isinstance(other, cls):
                return one * other
        return function(*map(_plain, args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Waiting, *args: Any) -> Any:
        return getattr(self.made(), name)(*args)

    return apply


for _name in _OPERATORS:
    setattr(Waiting, _name, _operator(_name))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):  # torch.cat and its like
        return type(value)(map(_plain, value))
    return value.made() if isinstance(value, Waiting) else value
