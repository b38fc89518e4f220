"""What a tokenizer does for this package."""

from typing import Protocol


class Encoder(Protocol):
    """A tokenizer: text to token ids."""

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text with the special tokens that the tokenizer adds to one."""
        ...

    def end_of_document(self) -> list[int]:
        """Return what ends a document that others follow: EOS where the tokenizer adds no special token to a text."""
        ...
