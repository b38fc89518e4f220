"""MULTIFLOW: weight magnitude times the flow through the two neurons that it connects."""

from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Method
from neuronal_ray.core.stats import SquareSum, Statistic


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic) -> Float32[Tensor, "rows columns"]:
    """Return |W_ij| * v_j with v_j the mean over rows of |W_ij| * a_j (MULTIFLOW, CVPR 2024, equation 4).

    The row factor u_i of the published score is constant within a row, where it cannot change a ranking: it is left
    out. Computed in float32: the product of three terms underflows in half precision.
    Differs: no global magnitude threshold sets the linears' rates; the allocation does.
    """
    magnitude = weight.float().abs()
    return magnitude * (magnitude * inputs.norm).mean(dim=0)


METHOD = Method(score=score, statistic=SquareSum, released=True)
