"""Neuron alignment: how far the sparse model's activations are from the dense model's (equation 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from neuronal_ray.core.layout import Group


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """What one candidate gave: equation 2 (lower is better, infinite if the sparse model overflowed), and per
    group the dense minus the sparse activation norms [columns], signed and not normalized, on the host.

    `divergences`: KL(dense || sparse) of the next-token distributions, mean of each search sequence in nats a token;
    empty when it was not asked for.
    """

    misalignment: float
    signals: Mapping[Group, Float32[Tensor, " columns"]]
    divergences: tuple[float, ...] = ()

    def score(self, criterion: str) -> float:
        """The number that candidates are compared by, "alignment" or "kl"; lower is better."""
        assert criterion == "alignment" or self.divergences, "the trial was not asked for divergences"
        return self.misalignment if criterion == "alignment" else sum(self.divergences) / len(self.divergences)


def normalized(norms: Float[Tensor, "inputs columns"]) -> Float64[Tensor, "inputs columns"]:
    """Each input's activation norms scaled to sum 1, in float64; all-zero norms (a dead input) stay zero."""
    norms = norms.double()
    total = norms.sum(dim=1, keepdim=True)
    return norms / torch.where(total > 0, total, torch.ones_like(total))


def misalignments(
    dense: Float[Tensor, "inputs columns"], sparse: Float[Tensor, "inputs columns"]
) -> Float64[Tensor, " inputs"]:
    """Terms of equation 2: the L2 distance of an input's normalized norms over the number of features.

    The norms are per input feature over the calibration sequences (SquareSum.norm), as in the released code;
    |A_D| in the paper is their number.
    """
    distances: Tensor = torch.linalg.vector_norm(normalized(dense) - normalized(sparse), dim=1)
    return distances / dense.shape[1]


def total_misalignment(terms: Float64[Tensor, " inputs"], readers: Sequence[int]) -> float:
    """Equation 2: the sum of the terms, each counted as often as linears read that input; lower is better."""
    return float((terms.cpu() * torch.tensor(readers, dtype=torch.float64)).sum())
