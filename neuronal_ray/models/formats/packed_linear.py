"""Linears that multiply by a packed weight, which makes sparse generation faster on a CPU."""

import logging

import torch
from jaxtyping import Float
from torch import Tensor, nn

from neuronal_ray.core.kernels.build import KernelUnavailable, library
from neuronal_ray.core.kernels.freed_memory import return_freed_memory
from neuronal_ray.core.kernels.packed_rows import DTYPES, MOST_VECTORS, PackedRows, multiply, pack_rows, unpack
from neuronal_ray.models.blocks import find_blocks

logger = logging.getLogger(__name__)

WORTHWHILE = 0.5
"""Fraction of zeros from which a linear is packed; with fewer zeros reading the packed weight is no faster."""


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight, for inference on a CPU.

    Up to MOST_VECTORS input vectors are multiplied by the packed weight; for more the weight is unpacked in each call.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = pack_rows(linear.weight.detach())
        self.register_buffer("bits", packed.bits)
        self.register_buffer("values", packed.values)
        self.register_buffer("starts", packed.starts)
        self.bias = linear.bias

    @property
    def packed(self) -> PackedRows:
        """The packed weight."""
        bits, values, starts = (self.get_buffer(name) for name in ("bits", "values", "starts"))
        return PackedRows(columns=self.in_features, bits=bits, values=values, starts=starts)

    @torch.no_grad()
    def forward(self, inputs: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch rows"]:
        """Multiply by the transposed weight and add the bias."""
        vectors = inputs.reshape(-1, self.in_features)
        if len(vectors) > MOST_VECTORS:
            return nn.functional.linear(inputs, unpack(self.packed), self.bias)
        outputs = multiply(self.packed, vectors)
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*inputs.shape[:-1], self.out_features)


def pack_linears(model: nn.Module) -> int:
    """Replace each linear of the blocks with at least WORTHWHILE zeros by a PackedLinear; return their number.

    Dense weights are freed one by one. Where the kernel cannot run, nothing changes and a warning says why.
    """
    try:
        library()
    except KernelUnavailable as reason:
        logger.warning("%s; the linears stay dense", reason)
        return 0
    count = 0
    for block in find_blocks(model)[1]:
        for path, module in list(block.named_modules()):
            if type(module) is not nn.Linear or module.weight.dtype not in DTYPES:
                continue
            if int(torch.count_nonzero(module.weight)) > (1 - WORTHWHILE) * module.weight.numel():
                continue
            block.set_submodule(path, PackedLinear(module))
            count += 1
    if count > 0:
        _release_mapping(model)
        return_freed_memory()
    return count


def _release_mapping(model: nn.Module) -> None:
    """Copy the remaining parameters: a single one keeps the whole memory-mapped checkpoint file in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
