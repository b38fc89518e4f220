"""A gate's product, silu(gates) * values (SwiGLU; Shazeer, 2020), between the linears of most models' MLP.

Written out in torch it is five passes over the widest activations of a block; on a GPU one pass of a Triton kernel
reads both and writes the product.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from neuronal_ray.core.kernels.dispatch import floats_for_triton


def gated_reference(
    gates: Float[Tensor, "*tokens columns"], values: Float[Tensor, "*tokens columns"]
) -> Float[Tensor, "*tokens columns"]:
    """The definition: rounded to the dtype before the product as well as after it."""
    return F.silu(gates) * values


def takes(gates: Tensor, values: Tensor) -> bool:
    """Whether `gated` has a kernel for these, whose gradients nobody wants."""
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
    """`gated_reference` but for the last bit of an exponential, of what `takes` takes."""
    from neuronal_ray.core.kernels.triton_gate import triton_gated

    out = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    triton_gated(gates, values, out)
    return out
