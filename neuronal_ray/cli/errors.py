"""Errors that a user can mend: one line on the terminal, exit code 2. Every other exception is a fault of ours."""

import difflib
from collections.abc import Iterable

_SHOWN = 60
_LIKE = 0.7


class BadInput(ValueError):
    """Input that cannot be used; the message says what was given, what is expected, and which flag or file."""


class UnsupportedModel(BadInput):
    """A model that cannot be pruned correctly, with the reason."""


def shown(value: object) -> str:
    """Return a value for a message: as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the names most like `name`, or nothing where none is like it."""
    bare = {each.lstrip("-"): each for each in known}
    near = difflib.get_close_matches(name.lstrip("-"), list(bare), n=3, cutoff=_LIKE)
    return f" (did you mean {' or '.join(bare[each] for each in near)}?)" if near else ""
