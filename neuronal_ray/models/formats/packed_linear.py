"""Linears that multiply by a packed weight, which makes sparse generation faster on a CPU."""

import logging
from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from neuronal_ray.core.kernels.build import KernelUnavailable, library
from neuronal_ray.core.kernels.freed_memory import return_freed_memory
from neuronal_ray.core.kernels.packed_rows import (
    DTYPES,
    MOST_VECTORS,
    PackedRows,
    multiply,
    pack_rows,
    packed_rows_bytes,
    unpack,
)
from neuronal_ray.models.blocks import find_blocks, find_linears
from neuronal_ray.models.experts import Expert

logger = logging.getLogger(__name__)

_PACKED = "bfloat16 and float32 on cpu"


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
    """Replace each nn.Linear of the blocks that gets smaller by a PackedLinear; return their number.

    Dense weights are freed one by one. A warning says how many linears stay dense, and why; where the kernel cannot run
    it is all of them.
    """
    try:
        library()
    except KernelUnavailable as error:
        logger.warning("%s; the linears stay dense", error)
        return 0
    packed, dense = 0, Counter[str]()
    for block in find_blocks(model)[1]:
        for path, module in {**dict(block.named_modules()), **find_linears(block)}.items():
            if not isinstance(module, nn.Linear):
                dense["no nn.Linear"] += isinstance(module, Conv1D | Expert)
            elif (reason := _reason(module)) is not None:
                dense[reason] += 1
            else:
                block.set_submodule(path, PackedLinear(module))
                packed += 1
    if dense := +dense:
        why = ", ".join(f"{count} ({reason})" for reason, count in dense.items())
        logger.warning("pack_linears: %d of %d linears stay dense: %s", dense.total(), packed + dense.total(), why)
    if packed > 0:
        _release_mapping(model)
        return_freed_memory()
    return packed


def _reason(linear: nn.Linear) -> str | None:
    """Return why a linear stays dense; None if its weight gets smaller."""
    weight = linear.weight
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}"
    if weight.dtype not in DTYPES or weight.device.type != "cpu":
        return f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}, packed are {_PACKED}"
    rows, columns = weight.shape
    kept = int(torch.count_nonzero(weight))
    if packed_rows_bytes(rows, columns, kept=kept, word=weight.element_size()) >= weight.nbytes:
        return "packing makes it no smaller"
    return None


def _release_mapping(model: nn.Module) -> None:
    """Copy the remaining parameters: a single one keeps the whole memory-mapped checkpoint file in memory."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
