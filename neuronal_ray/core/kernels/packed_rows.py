"""A sparse matrix packed by rows into bits and values, and its product with a few vectors."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from neuronal_ray.core.kernels.build import library

WORD = 32
"""Columns per word of bits."""
MOST_VECTORS = 8
"""Most vectors that one call multiplies."""
_SPARE_BYTES = 64  # the kernel reads, but does not use, this many bytes after the last value
_SUFFIXES = {torch.bfloat16: "bf16", torch.float32: "f32"}
DTYPES = tuple(_SUFFIXES)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRows:
    """A matrix without its zeros.

    `bits` has one bit for each column of a row, the first in the lowest bit of the row's first word, padded with zeros
    to whole words. The values whose bits are set begin at `values[starts[row]]`. Some zeros follow the last value.
    """

    columns: int
    bits: Int32[Tensor, "rows words"]
    values: Float[Tensor, " kept"]
    starts: Int64[Tensor, " rows"]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.bits.nbytes + self.values.nbytes + self.starts.nbytes


def packed_rows_bytes(rows: int, columns: int, *, kept: int, word: int) -> int:
    """Return the `nbytes` of a packed matrix with `kept` values of `word` bytes."""
    return rows * (WORD // 8 * -(-columns // WORD) + 8) + kept * word + _SPARE_BYTES


def pack_rows(weight: Float[Tensor, "rows columns"]) -> PackedRows:
    """Pack `weight`, bfloat16 or float32 on the CPU, without its zeros. Raises ValueError for any other."""
    if weight.dtype not in _SUFFIXES or weight.device.type != "cpu":
        raise ValueError(f"packed matrices are bfloat16 or float32 on the CPU, not {weight.dtype} on {weight.device}")
    columns = weight.shape[1]
    mask = (weight != 0).contiguous()  # that of a transposed weight has its strides
    padded = torch.nn.functional.pad(mask, (0, -columns % WORD)).numpy()
    bits = torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))  # [rows, words]
    counts = mask.sum(dim=1)
    spare = weight.new_zeros(_SPARE_BYTES // weight.element_size())
    return PackedRows(
        columns=columns, bits=bits, values=torch.cat([weight[mask], spare]), starts=counts.cumsum(0) - counts
    )


def multiply(packed: PackedRows, inputs: Float[Tensor, "vectors columns"]) -> Float[Tensor, "vectors rows"]:
    """Multiply at most MOST_VECTORS vectors by the transposed matrix, in the inputs' dtype, summed in float32.

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
    """Return the matrix, bit for bit except for the sign of zeros. Raises KernelUnavailable."""
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
    """Define `unpack`, in torch."""
    mask = (packed.bits[:, :, None] >> torch.arange(WORD, dtype=torch.int32) & 1).flatten(1)[:, : packed.columns].bool()
    return torch.zeros(mask.shape, dtype=packed.values.dtype).masked_scatter_(mask, packed.values)


def reference_multiply(packed: PackedRows, inputs: Float[Tensor, "vectors columns"]) -> Float[Tensor, "vectors rows"]:
    """Define `multiply` up to rounding, in torch and float64."""
    return (inputs.double() @ reference_unpack(packed).double().T).to(inputs.dtype)
