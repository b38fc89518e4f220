"""Lazy SiLU: an activation that is computed together with the product that follows it, silu(gates) * values.

Models compute the two separately. The result of the activation is a `LazySilu`, computed when it is used: a product
uses the kernel if that supports the tensors; any other use sees the tensor that the activation would have returned.
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
"""Special methods, which Python looks up on the class; other methods go through `__getattr__`."""


@torch.no_grad()
def is_silu(module: nn.Module) -> bool:
    """Return whether a module without weights computes `silu`, judged by its values on some inputs."""
    if [*module.parameters(), *module.buffers(), *module.children()]:
        return False
    for dtype in (torch.float32, torch.bfloat16):
        inputs = torch.linspace(-8, 8, 1001).to(dtype)
        try:
            outputs = module(inputs)
        except (RuntimeError, TypeError, ValueError):  # the module takes other arguments
            return False
        if not isinstance(outputs, Tensor) or outputs.dtype != dtype or not torch.equal(outputs, F.silu(inputs)):
            return False
    return True


class LazySilu:
    """silu(gates), computed on first use; torch functions accept it as a tensor."""

    def __init__(self, gates: Tensor) -> None:
        self._gates = gates
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """Return the tensor."""
        if self._value is None:
            self._value = F.silu(self._gates)
        return self._value

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, Tensor) and gate_takes(self._gates, other):
            return gated(self._gates, other)
        return self.value() * other

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        return getattr(self.value(), name)

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            lazy, other = args if isinstance(args[0], cls) else reversed(args)
            if not isinstance(other, cls):
                return lazy * other
        return function(*map(_plain, args), **{name: _plain(value) for name, value in (kwargs or {}).items()})


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: LazySilu, *args: Any) -> Any:
        return getattr(self.value(), name)(*args)

    return apply


for _name in _OPERATORS:
    setattr(LazySilu, _name, _operator(_name))


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):  # an argument of torch.cat, for example
        return type(value)(map(_plain, value))
    return value.value() if isinstance(value, LazySilu) else value
