"""What a tokenizer does for this package."""

from typing import Protocol

from neuronal_ray.data.documents import Conversation


class ChatError(ValueError):
    """A chat that the tokenizer cannot write as text, with the reason."""


class Encoder(Protocol):
    """A tokenizer: text to token ids."""

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that the tokenizer adds to one."""
        ...

    def end_of_document(self) -> list[int]:
        """Return what ends a document that others follow: EOS where the tokenizer adds no special token to a text."""
        ...

    def chat_text(self, conversation: Conversation) -> str:
        """Return a chat as the text that the model's template makes of it. Raises ChatError if there is none."""
        ...
