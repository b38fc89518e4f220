"""Rotary position embedding (RoFormer, section 3.2.2) in the two-halves form of transformers.

In torch's operations it takes six passes over queries and keys, some of them not vectorized because heads are strided
in memory. On a GPU one pass of a Triton kernel reads and writes them once.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from neuronal_ray.core.kernels.dispatch import floats_for_triton

Heads = Float[Tensor, "sequences heads tokens features"]
Angles = Float[Tensor, "some tokens features"]
"""Cosines or sines of each position: for all sequences together, or for each sequence."""


def rotary_reference(states: Heads, cos: Angles, sin: Angles) -> Heads:
    """Define `rotary`: both products are rounded to the dtype before they are added."""
    low, high = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat((-high, low), dim=-1) * sin[:, None]


def takes(states: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Return whether `rotary` supports these tensors, which must need no gradients."""
    return (
        floats_for_triton(states, cos, sin)
        and states.dim() == 4
        and cos.shape == sin.shape
        and cos.shape[0] in (1, states.shape[0])
        and cos.shape[1:] == (states.shape[2], states.shape[3])
        and states.shape[3] % 2 == 0
        and states.stride(3) == cos.stride(2) == sin.stride(2) == 1
    )


def rotary(states: Heads, cos: Angles, sin: Angles) -> Heads:
    """Compute `rotary_reference`, bit for bit, of tensors that `takes` accepts; the result has the states' strides."""
    from neuronal_ray.core.kernels.triton_rotary import triton_rotary

    out = torch.empty_like(states)
    triton_rotary(states, cos, sin, out)
    return out
