"""Checks of whether Triton kernels can run on given tensors."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def for_triton(*tensors: Tensor) -> bool:
    """Return whether all tensors are on a GPU and need no gradients, and Triton is installed (GPU builds of torch)."""
    return (
        all(tensor.device.type == "cuda" for tensor in tensors)
        and _has_triton()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def floats_for_triton(*tensors: Tensor) -> bool:
    """Return `for_triton` for tensors that share one floating-point type, other than float64.

    The kernels compute in float32.
    """
    return for_triton(*tensors) and len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype != torch.float64


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
