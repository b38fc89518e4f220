"""KL divergence of the sparse model's next-token distributions from the dense model's."""

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor


def log_probabilities(logits: Float[Tensor, "tokens vocabulary"]) -> Float32[Tensor, "tokens vocabulary"]:
    """Return ln p of every next token at temperature 1, in float32."""
    return torch.log_softmax(logits.float(), dim=-1)


def divergences(
    dense: Float32[Tensor, "tokens vocabulary"], sparse: Float[Tensor, "tokens vocabulary"]
) -> Float64[Tensor, " tokens"]:
    """Return KL(p || q) in nats at every position, p given as log-probabilities, q as logits; summed in float64.

    Never negative: the rounding errors of equal distributions are clamped. Not finite where the sparse model
    overflowed.
    """
    terms = log_probabilities(sparse).neg_().add_(dense).mul_(dense.exp())  # p * (ln p - ln q)
    return terms.sum(dim=-1, dtype=torch.float64).clamp(min=0)
