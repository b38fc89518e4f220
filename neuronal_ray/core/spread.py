"""Rates of a given mean and width, spread in proportion to given values or along a block schedule."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput

SCHEDULES = ("linear", "exp", "log")


def spread(values: Float[Tensor, " items"], *, lam: float, mean: float) -> Float64[Tensor, " items"]:
    """Return rates that are linear in `values`, of width 2 * lam, with the given mean (before any bound).

    Min-max scaling to [0, 2 * lam], then a shift to the mean (OWL, ICML 2024, section 3; NeuronAL section 4).
    Equal values give equal rates.
    """
    values = values.double()
    low, high = values.min(), values.max()
    if low == high:
        return torch.full_like(values, mean)
    # The released code's order of operations and numpy's order of summation: the last bit can change a floor.
    scaled = (values - low) * (1 / (high - low) * lam * 2)
    return scaled - float(scaled.numpy().mean()) + mean


def block_schedule(kind: str, num_blocks: int, *, lam: float, mean: float) -> Float64[Tensor, " blocks"]:
    """Return block rates of width 2 * lam and the given mean that increase with the block's index b = 0 .. B - 1.

    The kinds are those of NeuronAL's Table 2 (section 4.3), which gives no formulas; the released code has only
    `linear`, which rises in equal steps from mean - lam to mean + lam. `log` rises as ln(1 + b), steeply at first;
    `exp` is its inverse function and rises as B^(b / (B - 1)), steeply at the end. Raises BadInput for another kind.
    """
    if kind == "linear":
        density = spread(torch.arange(num_blocks, dtype=torch.float64), lam=lam, mean=1 - mean)
        return 1 - density.flip(0)
    if kind == "log":
        return spread(torch.arange(1, num_blocks + 1, dtype=torch.float64).log(), lam=lam, mean=mean)
    if kind == "exp":
        return spread(torch.logspace(0, 1, num_blocks, base=num_blocks, dtype=torch.float64), lam=lam, mean=mean)
    raise BadInput(f"--schedule: unknown name {kind!r}, expected one of: {', '.join(SCHEDULES)}")
