"""Which column of a table has the text, and the text of a value: as it is, or a chat in the model's own form."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.documents import Reading, one_line
from neuronal_ray.data.encoder import ChatError

FLAG = "--text-column"
TEXT, CHAT = "text", "messages"
STRING, MESSAGES = "string", "list of messages"
_SHOWN = 12

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Column:
    """A column's name and kind: STRING, MESSAGES, or the name of a type that is no text."""

    name: str
    kind: str

    @property
    def separator(self) -> str:
        """What joins rows to one text: chats end with what their template ends them with."""
        return "" if self.kind == MESSAGES else "\n\n"


def choose_column(columns: Sequence[Column], reading: Reading, *, source: str) -> Column:
    """Return the column with the text, and say which are ignored.

    The first of --text-column that is there; without it `text`, `messages` or the only column of strings. Raises
    BadInput where there is none, or no single one.
    """
    names = [column.name for column in columns]
    place = f"{reading.flag}: {source!r}"
    texts = [column.name for column in columns if column.kind == STRING]
    if reading.columns:
        name = next((wanted for wanted in reading.columns if wanted in names), None)
        if name is None:
            raise BadInput(f"{place} has the columns {_listed(names)}, none of {FLAG} {', '.join(reading.columns)}")
    elif TEXT in names:
        name = TEXT
    elif Column(CHAT, MESSAGES) in columns:
        name = CHAT
    elif len(texts) == 1:
        (name,) = texts
    elif texts:
        raise BadInput(f"{place} has several columns of text, {_listed(texts)}; {FLAG} chooses one")
    else:
        raise BadInput(f"{place} has the columns {_listed(names)}, expected a column {TEXT!r}; {FLAG} names another")
    if names.count(name) > 1:
        raise BadInput(f"{place} has {names.count(name)} columns {name!r}, expected one")
    chosen = columns[names.index(name)]
    if chosen.kind not in (STRING, MESSAGES):
        others = f"; {FLAG} names another" if texts else ""
        raise BadInput(f"{place}: column {name!r} is {chosen.kind}, expected string{others}")
    ignored = [other for other in names if other != name]
    if ignored:
        _say(f"{place}: column {name!r} is read, ignored: {_listed(ignored)}")
    elif name not in (TEXT, CHAT, *reading.columns):
        _say(f"{place} has no column {TEXT!r}: its only column {name!r} is read")
    return chosen


def text_of(value: object, column: Column, reading: Reading, *, place: str) -> str:
    """Return the text of a row's value. Raises BadInput that begins with `place` if it has none."""
    if column.kind == STRING:
        if not isinstance(value, str):
            raise BadInput(f"{place} has a {column.name!r} of type {type(value).__name__}, expected a string")
        return value
    if not isinstance(value, list) or not value or not all(map(is_message, value)):
        expected = "a list of messages with 'role' and 'content'"
        raise BadInput(f"{place} has no chat in {column.name!r} ({value!r:.60}), expected {expected}")
    messages = [{key: entry for key, entry in message.items() if entry is not None} for message in value]
    try:
        return reading.chat(messages)
    except ChatError as error:
        raise BadInput(f"{place} cannot be read as a chat: {one_line(error):.300}") from error


def is_message(value: object) -> bool:
    """Return whether a value is a message of a chat."""
    return isinstance(value, dict) and isinstance(value.get("role"), str) and "content" in value


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{[name[:60] for name in names[:_SHOWN]]}{more}"


@cache
def _say(message: str) -> None:
    """Say something once, however often the source is read."""
    logger.warning("%s", message)
