"""Magnitude: the smallest weights of each row go."""

from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Method
from neuronal_ray.core.stats import Statistic


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic | None) -> Float32[Tensor, "rows columns"]:
    """Return |W_ij|."""
    return weight.float().abs()


METHOD = Method(score=score, statistic=None, released=True)
