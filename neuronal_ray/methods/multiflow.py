"""MULTIFLOW: weight magnitude times the flow through the two neurons that it connects."""

from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.core.stats import Statistic

NEEDS_INPUTS = True


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic) -> Float32[Tensor, "rows columns"]:
    """|W_ij| * u_i * v_j, u and v the row and column means of |W_ij| * a_j (MULTIFLOW, CVPR 2024, equation 4).

    u_i is constant within a row; it stays for the released code's last bits. Computed in float32: the product
    of three terms underflows in half precision.
    Differs: no global magnitude threshold sets the linears' rates; the allocation does.
    """
    magnitude = weight.float().abs()
    flow = magnitude * inputs.norm
    column_flow = flow.t().contiguous().mean(dim=1)  # summed along memory, as the released code does
    return magnitude * flow.mean(dim=1)[:, None] * column_flow
