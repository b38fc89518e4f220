"""Levels and a width turned into rates with a given mean: block schedules and row redistribution."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def spread(levels: Float[Tensor, " items"], *, lam: float, mean: float) -> Float64[Tensor, " items"]:
    """Rates proportional to `levels`, of width 2 * lam, with the given mean (before any bound).

    Min-max scaling to [0, 2 * lam], then a shift to the mean (OWL, ICML 2024, section 3; NeuronAL section 4).
    Equal levels give equal rates.
    """
    levels = levels.double()
    low, high = levels.min(), levels.max()
    if low == high:
        return torch.full_like(levels, mean)
    # The released code's order of operations and numpy's order of summation: a last bit decides a floor.
    scaled = (levels - low) * (1 / (high - low) * lam * 2)
    return scaled - float(scaled.numpy().mean()) + mean


def linear_schedule(num_blocks: int, *, lam: float, mean: float) -> Float64[Tensor, " blocks"]:
    """Block rates rising linearly from mean - lam to mean + lam (NeuronAL section 4.1)."""
    density = spread(torch.arange(num_blocks, dtype=torch.float64), lam=lam, mean=1 - mean)
    return 1 - density.flip(0)
