"""How far the sparse model's next-token distributions are from the dense model's."""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor


def log_probabilities(logits: Float[Tensor, "tokens vocabulary"]) -> Float32[Tensor, "tokens vocabulary"]:
    """ln p of every next token at temperature 1, in float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def divergences(
    dense: Float32[Tensor, "tokens vocabulary"], sparse: Float[Tensor, "tokens vocabulary"]
) -> Float64[Tensor, " tokens"]:
    """KL(p || q) in nats at every position, p given as log-probabilities, q as logits; summed in float64.

    Not below 0: rounding of equal distributions does not count. Not finite where the sparse model overflowed.
    """
    terms = log_probabilities(sparse).neg_().add_(dense).mul_(dense.exp())  # p * (ln p - ln q)
    return terms.sum(dim=-1, dtype=torch.float64).clamp(min=0)
