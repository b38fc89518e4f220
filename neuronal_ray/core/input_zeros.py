"""Weights that are zero before anything is pruned."""

from collections.abc import Sequence

import torch
from jaxtyping import Int32
from torch import Tensor

from neuronal_ray.core.layout import Linear, LinearData
from neuronal_ray.core.plan import Counts


def row_zeros(linears: Sequence[LinearData]) -> dict[Linear, Int32[Tensor, " rows"]]:
    """Return the number of zeros in each row of some linears, on the host."""
    return {
        linear.spec.linear: (linear.weight == 0).sum(dim=1, dtype=torch.int32).cpu()  # [rows, columns] -> [rows]
        for linear in linears
    }


def number_of(zeros: Counts) -> int:
    """Return the number of zeros of all linears."""
    return sum(int(counts.sum()) for counts in zeros.values())
