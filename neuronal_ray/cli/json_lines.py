"""Append-only files of JSON objects, one per line: the form of every journal.

One rule for damage: a last line that is no JSON was cut short, and is dropped with a warning; anything else that cannot
be read is refused with its line number, and the file stays as it is.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import parse_json, read_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Line:
    """An object of a journal; errors about what is in it begin with `place`: flag, file and line."""

    value: dict[str, Any]
    place: str


class JsonLines:
    """A journal; `flag` is the one that names it to the user."""

    def __init__(self, path: Path, *, flag: str) -> None:
        self._path, self._flag = path, flag
        self._whole: int | None = None

    def read(self) -> list[Line]:
        """Return the objects in order, none if there is no file; `append` removes a last line that was cut short.

        Raises BadInput for a file that cannot be read, or that is damaged before its last line.
        """
        if not os.path.lexists(self._path):
            return []
        texts = read_bytes(self._path, flag=self._flag).split(b"\n")
        last = max((number for number, text in enumerate(texts) if text.strip()), default=0)
        lines = []
        for number, text in enumerate(texts):
            place = f"{self._flag}: line {number + 1} of {self._path}"
            if not text.strip():
                continue
            try:
                value = parse_json(text.decode("utf-8"), place=place)
            except (BadInput, UnicodeDecodeError) as error:
                if number != last:
                    raise BadInput(f"{place} is damaged ({str(error).removeprefix(f'{place}: ')})") from error
                logger.warning("%s, the last, was cut short and is dropped", place)
                self._whole = len(b"\n".join(texts[:last]))
                break
            if not isinstance(value, dict):
                raise BadInput(f"{place} is {value!r:.60}, expected a JSON object")
            lines.append(Line(value, place))
        return lines

    def append(self, entry: Mapping[str, Any]) -> None:
        """Append one object; it is on disk when this returns."""
        if self._whole is not None:
            os.truncate(self._path, self._whole)
            self._whole = None
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(entry, allow_nan=False)}")  # as the line before may lack its end
            file.flush()
            os.fsync(file.fileno())
