"""Wanda: weight magnitude times the norm of the input feature it multiplies."""

from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Method
from neuronal_ray.core.stats import SquareSum, Statistic


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic) -> Float32[Tensor, "rows columns"]:
    """Return |W_ij| * a_j (Sun et al., Wanda, ICLR 2024, equation 1)."""
    return weight.float().abs() * inputs.norm


METHOD = Method(score=score, statistic=SquareSum, released=True)
