"""A sparse matrix in few bytes: one bit per weight, and the values of those that stay."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_BITS = 8


@dataclass(frozen=True, eq=False)
class Packed:
    """`bits` of all weights in row-major order, the first in the lowest bit; `values` where a bit is set."""

    shape: tuple[int, int]
    bits: UInt8[Tensor, " bytes"]
    values: Float[Tensor, " kept"]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bits.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> "Packed":
        """The same on `device`."""
        return Packed(self.shape, self.bits.to(device), self.values.to(device))

    def unpack(self) -> Float[Tensor, "rows columns"]:
        """The matrix, bit for bit but for the sign of zeros."""
        places = torch.arange(_BITS, dtype=torch.uint8, device=self.bits.device)
        mask = (self.bits[:, None] >> places & 1).flatten()[: self.shape[0] * self.shape[1]].bool()
        flat = torch.zeros(mask.shape, dtype=self.values.dtype, device=self.bits.device)
        return flat.masked_scatter_(mask, self.values).view(self.shape)


def pack(weight: Float[Tensor, "rows columns"]) -> Packed:
    """`weight` without its zeros."""
    flat = weight.flatten()
    mask = flat != 0
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % _BITS)).view(-1, _BITS)
    powers = 2 ** torch.arange(_BITS, dtype=torch.uint8, device=weight.device)
    rows, columns = weight.shape
    return Packed((rows, columns), (padded * powers).sum(dim=1, dtype=torch.uint8), flat[mask])
