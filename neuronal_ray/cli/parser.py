"""argparse for every command: its errors are BadInput, one line that begins with the flag."""

import argparse
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from neuronal_ray.cli.errors import BadInput, did_you_mean, shown
from neuronal_ray.cli.values import KINDS, Kind

logger = logging.getLogger(__name__)

_TYPES = ((None, "str"), (int, "int"), (float, "float"), (Path, "path"))
_CHOICE = re.compile(r"invalid choice: (?P<given>.*) \(choose from (?P<known>.*)\)", re.DOTALL)


class Parser(argparse.ArgumentParser):
    """argparse that raises BadInput, knows no abbreviations and reads types as cli/values.py does.

    `parse_args` warns of flags that are given more than once where one value counts.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self._repeated: list[str] = []
        for kind, name in _TYPES:
            self.register("type", kind, _reader(KINDS[name]))

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Do what argparse does, and warn."""
        found = self.parse_known_args(args, namespace)[0]
        self.warn_of_repeated()
        return found

    def warn_of_repeated(self) -> None:
        """Warn of flags that were given more than once; for a command that checks more before it warns."""
        for flag in self._repeated:
            logger.warning("%s: given more than once, the last one counts", flag)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Do what argparse does, once the flags among `args` are known to be this parser's."""
        assert args is not None, "a command passes its arguments on"
        found, others = super().parse_known_args(self._checked(args), namespace)
        if others:
            raise BadInput(f"{shown(others[0])}: unexpected argument; the value of a flag is one word (see --help)")
        return found, []

    def _checked(self, args: Sequence[str]) -> list[str]:
        """Return the words with every flag known, and a value that begins with a dash joined to its flag."""
        words: list[str] = []
        given: set[str] = set()
        for number, argument in enumerate(args):
            if argument == "--":
                return words + list(args[number:])
            flag = argument.partition("=")[0]
            action = self._option_string_actions.get(flag)
            if action is not None and flag in given and isinstance(action, argparse._StoreAction):
                self._repeated.append(flag)
            if action is None and flag.startswith("-") and flag != "-":
                before = self._option_string_actions.get(words[-1]) if words else None
                if before is not None and before.nargs != 0 and not flag.startswith("--"):
                    words[-1] += f"={argument}"
                    continue
                near = did_you_mean(flag, self._option_string_actions)
                raise BadInput(f"{_cut(flag)}: unknown flag{near or ' (see --help)'}")
            if action is not None:
                given.add(flag)
                if argument == f"{flag}=--":  # which argparse takes out
                    raise BadInput(f"{flag}: '--' is no value")
            words.append(argument)
        return words

    def error(self, message: str) -> NoReturn:
        """Raise BadInput in place of argparse's usage and exit."""
        name, _, reason = message.removeprefix("argument ").partition(": ")
        if name.startswith("the following arguments are required"):
            raise BadInput(f"{reason}: missing (see --help)")
        if reason.startswith("expected "):
            reason = f"{reason} (a value that begins with -- is written {name}=VALUE)"
        elif reason.startswith("ignored explicit argument"):
            reason = "is a switch, which takes no value"
        elif choice := _CHOICE.fullmatch(reason):
            known = [part.strip("'") for part in choice["known"].split(", ")]
            near = did_you_mean(choice["given"].strip("'"), known)
            reason = f"{choice['given']} is not one of: {', '.join(known)}{near}"
        raise BadInput(f"{name}: {reason}")


def _reader(kind: Kind) -> Callable[[str], object]:
    def read(text: str) -> object:
        try:
            return kind.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{shown(text)} {error}") from error

    return read


def _cut(flag: str) -> str:
    return flag if len(flag) <= 60 and flag.isprintable() else shown(flag)
