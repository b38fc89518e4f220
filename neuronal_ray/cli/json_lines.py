"""Append-only files of JSON objects, one per line: the form of every journal.

One rule for damage: a line that was cut short, or that is no JSON object, is as if it were not there.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def append_line(path: Path, entry: Mapping[str, Any]) -> None:
    """Append one object to the file; it is on disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{json.dumps(entry)}")  # the newline comes first: the line before may have been cut short
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of the file in order, none if there is no file; damaged lines are left out."""
    if not path.is_file():
        return
    for line in path.read_bytes().split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:  # no JSON, or no UTF-8
            continue
        if isinstance(entry, dict):
            yield entry
