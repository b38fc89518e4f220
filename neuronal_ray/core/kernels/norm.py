"""Root mean square normalization (Zhang and Sennrich, 2019) in the forms used by transformers.

In torch's operations it takes six passes over the hidden states. On a GPU one pass of a Triton kernel reads and writes
them once.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neuronal_ray.core.kernels.dispatch import floats_for_triton

_WIDEST = 2**14
"""Most columns that the kernel supports: one program holds a row."""


@dataclass(frozen=True, kw_only=True)
class RmsNorm:
    """One form of the normalization.

    `rounded`: the result is rounded to the inputs' dtype before the product with the weight as well as after it.
    `plus_one`: the factor is the weight plus 1.
    """

    eps: float
    rounded: bool
    plus_one: bool


def rms_norm_reference(
    inputs: Float[Tensor, "*tokens columns"], weight: Float[Tensor, " columns"], form: RmsNorm
) -> Float[Tensor, "*tokens columns"]:
    """Define `rms_norm`."""
    wide = inputs.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + form.eps)
    factor = weight.float() + form.plus_one
    if form.rounded:
        normed = normed.to(inputs.dtype)
    return (factor * normed).to(inputs.dtype)


def takes(inputs: Tensor, weight: Tensor) -> bool:
    """Return whether `rms_norm` supports these tensors, which must need no gradients."""
    return (
        floats_for_triton(inputs, weight)
        and inputs.is_contiguous()
        and weight.is_contiguous()
        and inputs.shape[-1] == len(weight) <= _WIDEST
    )


def rms_norm(
    inputs: Float[Tensor, "*tokens columns"], weight: Float[Tensor, " columns"], form: RmsNorm
) -> Float[Tensor, "*tokens columns"]:
    """Compute `rms_norm_reference`, up to the order of its sum, of tensors that `takes` accepts."""
    from neuronal_ray.core.kernels.triton_norm import triton_rms_norm

    out = torch.empty_like(inputs)
    triton_rms_norm(inputs, weight, out, eps=form.eps, rounded=form.rounded, plus_one=form.plus_one)
    return out
