"""One input that a command cannot use, or that it can though it looks odd: what is done to a good folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Damage = Callable[[Path], Sequence[str]]
"""Damages a good folder (see good.py), and returns the flags to add to the command."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command on a folder that was damaged.

    It has to be refused in one line with one of the words in `named`; if it is `harmless`, the command has to succeed;
    if it is `either`, one of both. What `damage` returns is added to the command's good arguments; with `whole_line` it
    takes their place.
    """

    reader: str
    what: str
    command: str
    named: tuple[str, ...]
    damage: Damage
    harmless: bool = False
    either: bool = False
    whole_line: bool = False

    @property
    def name(self) -> str:
        """The name that reports have."""
        return f"{self.command}: {self.reader}: {self.what}"


def each(
    commands: Sequence[str],
    *,
    reader: str,
    what: str,
    named: Sequence[str],
    damage: Damage,
    harmless: bool = False,
    either: bool = False,
) -> Iterator[Case]:
    """The same damage before each of several commands."""
    for command in commands:
        yield Case(
            reader=reader,
            what=what,
            command=command,
            named=tuple(named),
            damage=damage,
            harmless=harmless,
            either=either,
        )


def flags(*words: str) -> Damage:
    """No damage: only flags to add; FOLDER in them is the case's folder."""
    return lambda folder: [word.replace("FOLDER", str(folder)) for word in words]
