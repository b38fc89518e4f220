"""Magnitude: the smallest weights of each row go."""

from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.core.stats import Statistic

STATISTIC: type[Statistic] | None = None
SOLVES = False


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic | None) -> Float32[Tensor, "rows columns"]:
    """|W_ij|."""
    return weight.float().abs()
