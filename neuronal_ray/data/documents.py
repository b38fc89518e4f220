"""Documents of calibration text, and what the readers of files with rows are told."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Conversation = list[dict[str, Any]]
"""Messages with a role and content, as a chat template takes them."""


@dataclass(frozen=True, kw_only=True)
class Documents:
    """`count` documents, each read when it is drawn.

    `continuous`: there is one continuous text, so that only the start of a sequence is drawn, not the document.
    `separator` joins them to one text.
    """

    count: int
    read: Callable[[int], str]
    continuous: bool
    separator: str = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows become text: the flag that named the source, the columns asked for, and chats as the model has them."""

    flag: str
    columns: tuple[str, ...] = ()
    chat: Callable[[Conversation], str]


def one_line(error: Exception) -> str:
    """Return the message of a library's error without its line breaks."""
    return " ".join(str(error).split())
