"""How a sequence of calibration or evaluation text begins: with the text itself, or with the BOS token."""

from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

FLAG = "--window-start"
PAPERS, BOS, AUTO = "papers", "bos", "auto"


def without_bos(encode: Callable[[str], list[int]], bos: int) -> Callable[[str], list[int]]:
    """Return `encode` without the BOS tokens that its results begin with."""

    def encode_text(text: str) -> list[int]:
        tokens = encode(text)
        first = next((place for place, token in enumerate(tokens) if token != bos), len(tokens))
        return tokens[first:]

    return encode_text


def begin_with_bos(rows: Int64[Tensor, "rows length"], bos: int) -> Int64[Tensor, "rows length_and_1"]:
    """Return the rows with the BOS token in front of each."""
    return torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)
