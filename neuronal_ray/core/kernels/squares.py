"""The sum over tokens of each input feature's square, which the search needs of every input of every candidate.

One pass squares and sums: a reduction of torch on a GPU, a C kernel (passes.c) that adds in the order of torch's sum on
a CPU. Without the kernel the squares are stored first.
"""

import functools

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from neuronal_ray.core.kernels.build import passes

Inputs = Float[Tensor, "sequences tokens columns"]

_NAMES = {torch.float32: "squares_f32", torch.bfloat16: "squares_bf16"}
_VECTORS = 32
"""Columns that torch sums at once; it adds the remaining columns in another order."""
_TESTED_SHAPES = ((1, 7, 32), (2, 150, 96), (1, 5000, 64))
"""Shapes on which the kernel is compared with torch."""


def squares_reference(inputs: Inputs) -> Float32[Tensor, " columns"]:
    """Define `column_squares`."""
    return inputs.float().square().sum(dim=(0, 1))  # [sequences, tokens, columns] -> [columns]


def column_squares(inputs: Inputs) -> Float32[Tensor, " columns"]:
    """Return each column's sum of squares, in float32; on a CPU equal to the reference bit for bit."""
    if inputs.device.type == "cuda":
        norms: Tensor = torch.linalg.vector_norm(inputs, dim=(0, 1), dtype=torch.float32)
        return norms.square()
    if (
        inputs.dtype in _NAMES
        and inputs.shape[-1] % _VECTORS == 0
        and inputs.is_contiguous()
        and not inputs.requires_grad
        and _adds_as_torch(inputs.dtype)
    ):
        return _in_one_pass(inputs)
    wide = inputs.float()
    squares = wide.square() if wide is inputs else wide.square_()
    return squares.sum(dim=(0, 1))  # [sequences, tokens, columns] -> [columns]


def _in_one_pass(inputs: Inputs) -> Float32[Tensor, " columns"]:
    sequences, tokens, columns = inputs.shape
    sums = torch.empty(columns, dtype=torch.float32)
    squares = getattr(passes(), _NAMES[inputs.dtype])
    squares(inputs.data_ptr(), sequences * tokens, columns, sums.data_ptr(), torch.get_num_threads())
    return sums


@functools.cache
def _adds_as_torch(dtype: torch.dtype) -> bool:
    """Return whether the kernel is available and adds in the order of this torch, which torch does not guarantee."""
    if passes() is None:
        return False
    source = torch.Generator().manual_seed(0)
    samples = (torch.randn(shape, generator=source).to(dtype) for shape in _TESTED_SHAPES)
    return all(torch.equal(_in_one_pass(inputs), squares_reference(inputs)) for inputs in samples)
