"""Root mean square normalization (Zhang and Sennrich, 2019) in the forms that transformers has of it.

Written out in torch it is six passes over the hidden states; on a GPU one pass of a Triton kernel reads and writes
them once.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neuronal_ray.core.kernels.dispatch import floats_for_triton

_WIDEST = 2**14
"""Columns: a row is held by one program."""


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """`rounded`: to the inputs' dtype before the weight as well as after it. `plus_one`: the weight is one less than
    the factor.
    """

    eps: float
    rounded: bool
    plus_one: bool


def rms_norm_reference(
    inputs: Float[Tensor, "*tokens columns"], weight: Float[Tensor, " columns"], form: RmsNorm
) -> Float[Tensor, "*tokens columns"]:
    """The definition."""
    wide = inputs.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + form.eps)
    factor = weight.float() + form.plus_one
    if form.rounded:
        normed = normed.to(inputs.dtype)
    return (factor * normed).to(inputs.dtype)


def takes(inputs: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` has a kernel for these, whose gradients nobody wants."""
    return floats_for_triton(inputs, weight) and inputs.is_contiguous() and inputs.shape[-1] == len(weight) <= _WIDEST


def rms_norm(
    inputs: Float[Tensor, "*tokens columns"], weight: Float[Tensor, " columns"], form: RmsNorm
) -> Float[Tensor, "*tokens columns"]:
    """`rms_norm_reference` but for the order of its sum, of what `takes` takes."""
    from neuronal_ray.core.kernels.triton_norm import triton_rms_norm

    out = torch.empty_like(inputs)
    triton_rms_norm(inputs, weight, out, eps=form.eps, rounded=form.rounded, plus_one=form.plus_one)
    return out
