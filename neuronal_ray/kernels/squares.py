"""The sum over tokens of each input feature's square: what the search observes of every input of every candidate.

On a GPU one reduction that squares on the way reads the input once. On a CPU torch has no such reduction by the vector:
the squares lie in memory first, those of a narrow type where they were widened.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

Inputs = Float[Tensor, "sequences tokens columns"]


def squares_reference(inputs: Inputs) -> Float32[Tensor, " columns"]:
    """The definition."""
    return inputs.float().square().sum(dim=(0, 1))  # [sequences, tokens, columns] -> [columns]


def column_squares(inputs: Inputs) -> Float32[Tensor, " columns"]:
    """Summed in float32; on a CPU equal to the reference bit for bit."""
    if inputs.device.type == "cuda":
        norms: Tensor = torch.linalg.vector_norm(inputs, dim=(0, 1), dtype=torch.float32)
        return norms.square()
    wide = inputs.float()
    squares = wide.square() if wide is inputs else wide.square_()
    return squares.sum(dim=(0, 1))  # [sequences, tokens, columns] -> [columns]
