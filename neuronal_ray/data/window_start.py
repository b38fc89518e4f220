"""How a sequence of calibration or evaluation text begins: with the text itself, or with the BOS token."""

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.data.documents import Conversation
from neuronal_ray.data.encoder import Encoder

FLAG = "--window-start"
PAPERS, BOS, AUTO = "papers", "bos", "auto"


class WithoutBos:
    """An encoder without the BOS tokens that the ids of a text begin with."""

    def __init__(self, encode: Encoder, bos: int) -> None:
        self._encode, self._bos = encode, bos

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text from the first that is not BOS."""
        tokens = self._encode(text)
        first = next((place for place, token in enumerate(tokens) if token != self._bos), len(tokens))
        return tokens[first:]

    def end_of_document(self) -> list[int]:
        """Return what ends a document; where that is nothing, BOS begins the next one."""
        return self._encode.end_of_document() or [self._bos]

    def chat_text(self, conversation: Conversation) -> str:
        """Return a chat as the model's template writes it."""
        return self._encode.chat_text(conversation)


def begin_with_bos(rows: Int64[Tensor, "rows length"], bos: int) -> Int64[Tensor, "rows length_and_1"]:
    """Return the rows with the BOS token in front of each."""
    return torch.cat([rows.new_full((len(rows), 1), bos), rows], dim=1)
