"""Neuron alignment: how far the sparse model's activations are from the dense model's (equation 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from neuronal_ray.core.layout import Group


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """The result of trying one candidate.

    `misalignment` is equation 2: lower is better, infinite if the sparse model overflowed. `signals` holds the dense
    minus the sparse activation norms [columns] of each group, signed, not normalized, on the host. `divergences` is
    KL(dense || sparse) of the next-token distributions, the mean of each search sequence in nats per token; empty
    when it was not requested.
    """

    misalignment: float
    signals: Mapping[Group, Float32[Tensor, " columns"]]
    divergences: tuple[float, ...] = ()

    def score(self, criterion: str) -> float:
        """Return the number by which `criterion`, "alignment" or "kl", compares candidates; lower is better."""
        assert criterion == "alignment" or self.divergences, "the trial computed no divergences"
        return self.misalignment if criterion == "alignment" else sum(self.divergences) / len(self.divergences)


def normalized(norms: Float[Tensor, "inputs columns"]) -> Float64[Tensor, "inputs columns"]:
    """Scale each input's activation norms to sum 1, in float64; all-zero norms (a dead input) stay zero."""
    norms = norms.double()
    total = norms.sum(dim=1, keepdim=True)
    return norms / torch.where(total > 0, total, torch.ones_like(total))


def misalignments(
    dense: Float[Tensor, "inputs columns"], sparse: Float[Tensor, "inputs columns"]
) -> Float64[Tensor, " inputs"]:
    """Compute the terms of equation 2: the L2 distance of an input's normalized norms, divided by their number.

    The norms are per input feature over the calibration sequences (SquareSum.norm), as in the released code;
    |A_D| in the paper is their number.
    """
    distances: Tensor = torch.linalg.vector_norm(normalized(dense) - normalized(sparse), dim=1)
    return distances / dense.shape[1]


def total_misalignment(terms: Float64[Tensor, " inputs"], readers: Sequence[int]) -> float:
    """Sum the terms of equation 2, each weighted by the number of linears that read its input; lower is better."""
    return float((terms.cpu() * torch.tensor(readers, dtype=torch.float64)).sum())
