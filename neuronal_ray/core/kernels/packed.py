"""A sparse matrix as bits and values by rows, its product with a few vectors, and the references for both."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from neuronal_ray.core.kernels.build import library

WORD = 32
"""Columns to a word of bits."""
MOST_VECTORS = 8
"""Vectors that one call multiplies by."""
_SPARE_BYTES = 64  # read after the last value, never used
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
DTYPES = tuple(_SUFFIXES)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """`bits` of a row's columns, the first in the lowest bit of its first word, padded with zeros to whole words; from
    `values[starts[row]]` on the values whose bits are set. Some zeros follow the last value.
    """

    columns: int
    bits: Int32[Tensor, "rows words"]
    values: Float[Tensor, " kept"]
    starts: Int64[Tensor, " rows"]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bits.nbytes + self.values.nbytes + self.starts.nbytes


def pack_rows(weight: Float[Tensor, "rows columns"]) -> PackedRows:
    """`weight`, in bfloat16 or float32 on the CPU, without its zeros."""
    if weight.dtype not in _SUFFIXES or weight.device.type != "cpu":
        raise ValueError(f"packed matrices are bfloat16 or float32 on the CPU, not {weight.dtype} on {weight.device}")
    columns = weight.shape[1]
    mask = weight != 0
    padded = torch.nn.functional.pad(mask, (0, -columns % WORD)).numpy()
    bits = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))  # [rows, words]
    counts = mask.sum(dim=1)
    spare = weight.new_zeros(_SPARE_BYTES // weight.element_size())
    return PackedRows(
        columns=columns, bits=bits, values=torch.cat([weight[mask], spare]), starts=counts.cumsum(0) - counts
    )


def multiply(packed: PackedRows, inputs: Float[Tensor, "vectors columns"]) -> Float[Tensor, "vectors rows"]:
    """`inputs` times the transposed matrix for at most MOST_VECTORS vectors, summed in float32, in the inputs' dtype.

    Raises KernelUnavailable.
    """
    suffix, vectors = _SUFFIXES[packed.values.dtype], len(inputs)
    assert vectors <= MOST_VECTORS
    assert inputs.dtype == packed.values.dtype
    rows, words = packed.bits.shape
    padded = torch.nn.functional.pad(inputs, (0, words * WORD - packed.columns)).contiguous()
    outputs = torch.empty(vectors, rows)
    getattr(library(), f"packed_linear_{suffix}")(
        *(tensor.data_ptr() for tensor in (packed.bits, packed.values, packed.starts, padded, outputs)),
        rows,
        words,
        vectors,
        torch.get_num_threads(),
    )
    return outputs.to(inputs.dtype)


def unpack(packed: PackedRows) -> Float[Tensor, "rows columns"]:
    """The matrix, bit for bit but for the sign of zeros. Raises KernelUnavailable."""
    rows, words = packed.bits.shape
    outputs = torch.empty(rows, words * WORD, dtype=packed.values.dtype)
    getattr(library(), f"packed_unpack_{_SUFFIXES[outputs.dtype]}")(
        *(tensor.data_ptr() for tensor in (packed.bits, packed.values, packed.starts, outputs)),
        rows,
        words,
        torch.get_num_threads(),
    )
    return outputs[:, : packed.columns]


def reference_unpack(packed: PackedRows) -> Float[Tensor, "rows columns"]:
    """What `unpack` returns, by torch."""
    mask = (packed.bits[:, :, None] >> torch.arange(WORD, dtype=torch.int32) & 1).flatten(1)[:, : packed.columns].bool()
    return torch.zeros(mask.shape, dtype=packed.values.dtype).masked_scatter_(mask, packed.values)


def reference_multiply(packed: PackedRows, inputs: Float[Tensor, "vectors columns"]) -> Float[Tensor, "vectors rows"]:
    """What `multiply` returns but for rounding, by torch in float64."""
    return (inputs.double() @ reference_unpack(packed).double().T).to(inputs.dtype)
