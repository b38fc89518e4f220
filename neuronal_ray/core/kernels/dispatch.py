"""Which tensors can a Triton kernel have?"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def for_triton(*tensors: Tensor) -> bool:
    """Whether all are on a GPU, Triton is here (torch brings it where it was built for a GPU), and nobody wants
    gradients of them.
    """
    return (
        all(tensor.device.type == "cuda" for tensor in tensors)
        and _has_triton()
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )


def floats_for_triton(*tensors: Tensor) -> bool:
    """`for_triton` of tensors of one floating-point type that the kernels compute with in float32."""
    return for_triton(*tensors) and len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype != torch.float64


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
