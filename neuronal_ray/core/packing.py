"""A sparse matrix in few bytes: one bit per weight, and the values of those that stay."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_BITS = 8
_SLICE = 2**17  # weights at a time: they, their mask and their places stay in a core's cache
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Packed:
    """`bits` of all weights in row-major order, the first in the lowest bit; `values` where a bit is set."""

    shape: tuple[int, ...]
    bits: UInt8[Tensor, " bytes"]
    values: Float[Tensor, " kept"]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.bits.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> "Packed":
        """The same on `device`."""
        return Packed(self.shape, self.bits.to(device), self.values.to(device))

    def unpack(self) -> Float[Tensor, "..."]:
        """The tensor, bit for bit."""
        size = torch.Size(self.shape).numel()
        if self.bits.device.type == "cpu":
            words = unpack_words(self.bits.numpy(), _words(self.values), size)
            return torch.from_numpy(words.view(_signed(words))).view(self.values.dtype).view(self.shape)
        return _unpack_in_torch(self.bits, self.values, size).view(self.shape)


def pack(weight: Float[Tensor, "..."]) -> Packed:
    """`weight` without its zeros; a negative zero is a value, as every bit comes back."""
    shape = tuple(weight.shape)
    flat = weight.contiguous().flatten()
    if weight.device.type == "cpu":
        bits, words = pack_words(_words(flat))
        values = torch.from_numpy(words.view(_signed(words))).view(weight.dtype)
        return Packed(shape, torch.from_numpy(bits), values)
    return Packed(shape, *_pack_in_torch(flat))


def _pack_in_torch(flat: Float[Tensor, " size"]) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " kept"]]:
    """Bits and values by operations that every device has."""
    mask = flat.view(_INTEGERS[flat.itemsize]) != 0
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % _BITS)).view(-1, _BITS)
    powers = 2 ** torch.arange(_BITS, dtype=torch.uint8, device=flat.device)
    return (padded * powers).sum(dim=1, dtype=torch.uint8), flat[mask]


def _unpack_in_torch(
    bits: UInt8[Tensor, " bytes"], values: Float[Tensor, " kept"], size: int
) -> Float[Tensor, " size"]:
    """What `_pack_in_torch` packed."""
    places = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    mask = (bits[:, None] >> places & 1).flatten()[:size].bool()  # [bytes, 8] -> [size]
    flat = torch.zeros(size, dtype=values.dtype, device=bits.device)
    return flat.masked_scatter_(mask, values)


def pack_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bits and values of flat unsigned `words`, the bits of numbers; a word that is not 0 is a value."""
    bits = np.empty(-(-len(words) // _BITS), np.uint8)
    values = np.empty(int(np.count_nonzero(words)), words.dtype)
    filled = 0
    for start in range(0, len(words), _SLICE):
        part = words[start : start + _SLICE]
        mask = part != 0
        places = np.flatnonzero(mask)  # through places: a boolean index is several times slower
        bits[start // _BITS : (start + len(part) + _BITS - 1) // _BITS] = np.packbits(mask, bitorder="little")
        values[filled : filled + len(places)] = part[places]
        filled += len(places)
    return bits, values


def unpack_words(bits: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """The flat words, `size` of them, of which `pack_words` made `bits` and `values`; bits behind them are ignored."""
    words = np.zeros(size, values.dtype)
    taken = 0
    for start in range(0, size, _SLICE):
        part = words[start : start + _SLICE]
        mask = np.unpackbits(bits[start // _BITS :][: -(-len(part) // _BITS)], count=len(part), bitorder="little")
        places = np.flatnonzero(mask.view(bool))
        part[places] = values[taken : taken + len(places)]
        taken += len(places)
    return words


def _words(tensor: Tensor) -> np.ndarray:
    """The bits of a tensor's numbers as unsigned integers."""
    words: np.ndarray = tensor.view(_INTEGERS[tensor.itemsize]).numpy()
    return words.view(f"u{words.itemsize}")


def _signed(words: np.ndarray) -> str:
    """The integers that torch has for these words."""
    return f"i{words.itemsize}"
