"""Wanda: weight magnitude times the norm of the input feature it multiplies."""

from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.core.stats import SquareSum, Statistic

STATISTIC: type[Statistic] | None = SquareSum
SOLVES = False


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic) -> Float32[Tensor, "rows columns"]:
    """|W_ij| * a_j (Sun et al., Wanda, ICLR 2024, equation 1)."""
    return weight.float().abs() * inputs.norm
