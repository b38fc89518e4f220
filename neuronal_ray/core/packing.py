"""Packed storage of a sparse tensor: one bit per weight, and the values that are not zero."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

_BITS = 8
_SLICE = 2**17  # weights per slice: a slice, its mask and its positions fit in a core's cache
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class Packed:
    """`bits` of all weights in row-major order, the first in the lowest bit; `values` where a bit is set."""

    shape: tuple[int, ...]
    bits: UInt8[Tensor, " bytes"]
    values: Float[Tensor, " kept"]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.bits.nbytes + self.values.nbytes

    def to(self, device: torch.device) -> "Packed":
        """Copy to `device`."""
        return Packed(self.shape, self.bits.to(device), self.values.to(device))

    def unpack(self) -> Float[Tensor, "..."]:
        """Return the original tensor, bit for bit."""
        size = torch.Size(self.shape).numel()
        if self.bits.device.type == "cpu":
            words = unpack_words(self.bits.numpy(), _words(self.values), size)
            return torch.from_numpy(words.view(_signed(words))).view(self.values.dtype).view(self.shape)
        return _unpack_in_torch(self.bits, self.values, size).view(self.shape)


def pack(weight: Float[Tensor, "..."]) -> Packed:
    """Pack `weight` without its zeros; a negative zero is kept as a value, so that unpacking is exact."""
    shape = tuple(weight.shape)
    flat = weight.contiguous().flatten()
    if weight.device.type == "cpu":
        bits, words = pack_words(_words(flat))
        values = torch.from_numpy(words.view(_signed(words))).view(weight.dtype)
        return Packed(shape, torch.from_numpy(bits), values)
    return Packed(shape, *_pack_in_torch(flat))


def _pack_in_torch(flat: Float[Tensor, " size"]) -> tuple[UInt8[Tensor, " bytes"], Float[Tensor, " kept"]]:
    """Return bits and values, by operations that every device supports."""
    mask = flat.view(_INTEGERS[flat.itemsize]) != 0
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -len(mask) % _BITS)).view(-1, _BITS)
    powers = 2 ** torch.arange(_BITS, dtype=torch.uint8, device=flat.device)
    return (padded * powers).sum(dim=1, dtype=torch.uint8), flat[mask]


def _unpack_in_torch(
    bits: UInt8[Tensor, " bytes"], values: Float[Tensor, " kept"], size: int
) -> Float[Tensor, " size"]:
    """Invert `_pack_in_torch`."""
    places = torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    mask = (bits[:, None] >> places & 1).flatten()[:size].bool()  # [bytes, 8] -> [size]
    flat = torch.zeros(size, dtype=values.dtype, device=bits.device)
    return flat.masked_scatter_(mask, values)


def pack_words(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits and values of flat unsigned `words` (bit patterns of numbers); a value is a word other than 0."""
    bits = np.empty(-(-len(words) // _BITS), np.uint8)
    values = np.empty(int(np.count_nonzero(words)), words.dtype)
    filled = 0
    for start in range(0, len(words), _SLICE):
        piece = words[start : start + _SLICE]
        mask = piece != 0
        places = np.flatnonzero(mask)  # indexing by position: a boolean index is several times slower
        bits[start // _BITS : (start + len(piece) + _BITS - 1) // _BITS] = np.packbits(mask, bitorder="little")
        values[filled : filled + len(places)] = piece[places]
        filled += len(places)
    return bits, values


def unpack_words(bits: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Invert `pack_words`: return `size` flat words; surplus bits are ignored."""
    words = np.zeros(size, values.dtype)
    taken = 0
    for start in range(0, size, _SLICE):
        piece = words[start : start + _SLICE]
        mask = np.unpackbits(bits[start // _BITS :][: -(-len(piece) // _BITS)], count=len(piece), bitorder="little")
        places = np.flatnonzero(mask.view(bool))
        piece[places] = values[taken : taken + len(places)]
        taken += len(places)
    return words


def _words(tensor: Tensor) -> np.ndarray:
    """View a tensor's bit patterns as unsigned integers."""
    words: np.ndarray = tensor.view(_INTEGERS[tensor.itemsize]).numpy()
    return words.view(f"u{words.itemsize}")


def _signed(words: np.ndarray) -> str:
    """Return numpy's name of the signed integers of the words' size: torch lacks most unsigned ones."""
    return f"i{words.itemsize}"
