"""Checks of whether Triton kernels can run on given tensors."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from neuronal_ray.core.kernels.trial import tried_once


def for_triton(*tensors: Tensor) -> bool:
    """Return whether all tensors are on a GPU and need no gradients, and Triton is installed and works there."""
    return (
        all(tensor.device.type == "cuda" for tensor in tensors)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        and _triton_works(tensors[0].device)
    )


def floats_for_triton(*tensors: Tensor) -> bool:
    """Return `for_triton` for tensors that share one floating-point type, other than float64.

    The kernels compute in float32.
    """
    return for_triton(*tensors) and len({tensor.dtype for tensor in tensors}) == 1 and tensors[0].dtype != torch.float64


def _triton_works(device: torch.device) -> bool:
    """Return whether Triton is installed (with GPU builds of torch) and launches a kernel: it needs a C compiler."""
    return _has_triton() and launch_one(device) is not None


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@tried_once("the Triton kernels")
def launch_one(device: torch.device) -> Tensor:
    """Return what the smallest of the kernels makes of two weights on `device`."""
    from neuronal_ray.core.kernels.triton_masking import triton_zero_lowest

    weight = torch.ones(1, 2, device=device)
    ranks, removed = torch.tensor([[0, 1]], device=device), torch.tensor([1], dtype=torch.int32, device=device)
    out = torch.empty_like(weight)
    triton_zero_lowest(weight, ranks, removed, out)
    if out.tolist() != [[0.0, 1.0]]:  # waits for the device
        raise RuntimeError(f"a kernel returned {out.tolist()}, expected [[0.0, 1.0]]")
    return out
