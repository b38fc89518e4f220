"""The product silu(gates) * values (SwiGLU; Shazeer, 2020) in the MLP of most models.

In torch's operations it takes five passes over the widest activations of a block. On a GPU one pass of a Triton kernel
reads both tensors and writes the product.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from neuronal_ray.core.kernels.dispatch import floats_for_triton


def gated_reference(
    gates: Float[Tensor, "*tokens columns"], values: Float[Tensor, "*tokens columns"]
) -> Float[Tensor, "*tokens columns"]:
    """Define `gated`: round to the dtype both before and after the product."""
    return F.silu(gates) * values


def takes(gates: Tensor, values: Tensor) -> bool:
    """Return whether `gated` supports these tensors, which must need no gradients."""
    return (
        floats_for_triton(gates, values)
        and gates.shape == values.shape
        and gates.dim() >= 2
        and gates.numel() > 0
        and gates.stride(-1) == values.stride(-1) == 1
    )


def gated(
    gates: Float[Tensor, "*tokens columns"], values: Float[Tensor, "*tokens columns"]
) -> Float[Tensor, "*tokens columns"]:
    """Compute `gated_reference`, up to the last bit of an exponential, of tensors that `takes` accepts."""
    from neuronal_ray.core.kernels.triton_gate import triton_gated

    out = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    triton_gated(gates, values, out)
    return out
