"""Kernels in place of a block's normalizations, rotary embeddings and gates.

On a GPU a LLaMA block spends a third of its time on them, because transformers computes them in many passes over
memory. Modules and functions are recognized by their values on random inputs, never by a model's name; one that differs
by a bit from a kernel's definition stays as it is.
"""

import functools
from collections.abc import Callable
from itertools import product
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn

from neuronal_ray.core.kernels.norm import RmsNorm, rms_norm, rms_norm_reference
from neuronal_ray.core.kernels.norm import takes as norm_takes
from neuronal_ray.core.kernels.rotary import rotary, rotary_reference
from neuronal_ray.core.kernels.rotary import takes as rotary_takes
from neuronal_ray.models.fused_gates import LazySilu, is_silu

_ROTARY = "apply_rotary_pos_emb"
"""The name of the function in transformers' modules of attention."""

_ROWS = 3
_SHAPE = (2, 3, 5, 8)  # sequences, heads, tokens, features


def fuse(block: nn.Module) -> list[str]:
    """Let the block's modules call kernels for inputs that these support; return the paths of the changed modules."""
    fused = []
    for path, module in block.named_modules():
        form = norm_form(module)
        if form is not None:
            module.forward = _normalizing(module, module.forward, form)
        gates = is_silu(module)
        if gates:
            module.forward = LazySilu
        own = type(module).forward
        rotating = _rotating(own) if isinstance(own, FunctionType) else None
        if rotating is not None:
            module.forward = MethodType(rotating, module)
        if form is not None or gates or rotating is not None:
            fused.append(path)
    return fused


@torch.no_grad()
def norm_form(module: nn.Module) -> RmsNorm | None:
    """Return the form for which the module equals `rms_norm_reference` with its weight; None for any other module."""
    weight = getattr(module, "weight", None)
    own = [*module.parameters(), *module.buffers(), *module.children()]
    if not isinstance(weight, Tensor) or len(own) != 1 or weight.dim() != 1:
        return None
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(_ROWS, 1, len(weight), generator=generator).to(weight.device, weight.dtype)
    try:
        expected = module(inputs)
    except (RuntimeError, TypeError, ValueError):  # the module takes other arguments
        return None
    epsilons = [value for value in vars(module).values() if isinstance(value, float)]
    for eps, rounded, plus_one in product(epsilons, (True, False), (False, True)):
        form = RmsNorm(eps=eps, rounded=rounded, plus_one=plus_one)
        if _equal(expected, rms_norm_reference(inputs, weight, form)):
            return form
    return None


def _equal(found: object, expected: Tensor) -> bool:
    """Return whether dtype and values are equal."""
    return isinstance(found, Tensor) and found.dtype == expected.dtype and torch.equal(found, expected)


def _normalizing(module: nn.Module, own: Callable[..., object], form: RmsNorm) -> Callable[..., object]:
    def forward(inputs: Tensor) -> object:
        weight = module.get_parameter("weight")
        return rms_norm(inputs, weight, form) if norm_takes(inputs, weight) else own(inputs)

    return forward


@functools.cache
def _rotating(forward: FunctionType) -> FunctionType | None:
    """Return `forward` with the kernel in place of its rotary embedding, None if it calls none."""
    own = forward.__globals__.get(_ROTARY)
    if _ROTARY not in forward.__code__.co_names or own is None or not is_rotary(own):
        return None

    def rotate(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor, *more: object, **named: object) -> object:
        if not more and not named and all(rotary_takes(states, cos, sin) for states in (queries, keys)):
            return rotary(queries, cos, sin), rotary(keys, cos, sin)
        return own(queries, keys, cos, sin, *more, **named)

    names = forward.__globals__ | {_ROTARY: rotate}
    rotating = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rotating.__kwdefaults__ = forward.__kwdefaults__
    return rotating


@torch.no_grad()
def is_rotary(function: Callable[..., object]) -> bool:
    """Return whether `function(queries, keys, cos, sin)` equals `rotary_reference` of queries and keys."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        queries, keys = (torch.randn(_SHAPE, generator=generator).to(dtype) for _ in range(2))
        cos, sin = (torch.randn(_SHAPE[0], *_SHAPE[2:], generator=generator).to(dtype) for _ in range(2))
        try:
            outputs = function(queries, keys, cos, sin)
        except (RuntimeError, TypeError, ValueError):  # the function takes other arguments
            return False
        expected = [rotary_reference(states, cos, sin) for states in (queries, keys)]
        if not isinstance(outputs, tuple) or len(outputs) != len(expected):
            return False
        if not all(_equal(*pair) for pair in zip(outputs, expected, strict=True)):
            return False
    return True
