"""Text of a source: a data set on the Hugging Face hub, the sample in this package (`builtin`), a file or a directory.

Functions take the command-line flag that named the source, for their error messages.
"""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from neuronal_ray.cli.errors import BadInput, shown
from neuronal_ray.cli.read_files import check_file
from neuronal_ray.data.columns import FLAG
from neuronal_ray.data.documents import Documents, Reading
from neuronal_ray.data.encoder import Encoder
from neuronal_ray.data.file_formats import COMPRESSED, FORMATS, format_of
from neuronal_ray.data.folders import folder_documents, read_text
from neuronal_ray.data.hub_text import HUB, hub_documents, hub_rows, is_hub_id
from neuronal_ray.data.json_rows import json_documents
from neuronal_ray.data.tables import table_documents

TOKEN_EXTENSION = ".safetensors"
EXTENSIONS = (*FORMATS, TOKEN_EXTENSION)
BUILTIN = "builtin"
NAMES = (*HUB, BUILTIN)
EXPECTED = (
    f"one of {', '.join(NAMES)}, a file ending in {', '.join(EXTENSIONS)} (those with text also in "
    f"{', '.join(COMPRESSED)}), a directory of such files, or OWNER/NAME on the Hugging Face hub"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluationText:
    """One text to be divided into windows, of which at most `windows` are evaluated (None: all)."""

    text: str
    windows: int | None


def is_file_name(source: str) -> bool:
    """Return whether a source is a path (judged by its extension) rather than a name."""
    return source not in NAMES and (format_of(Path(source)) is not None or _ending(source) == TOKEN_EXTENSION)


def is_text(source: str) -> bool:
    """Return whether a source is a text by its form, whether it is there or not: no benchmark is named like one."""
    return source in NAMES or is_file_name(source) or is_hub_id(source) or ("/" in source and is_directory(source))


def is_directory(source: str) -> bool:
    """Return whether a source is a directory that is there."""
    try:
        return bool(source.strip()) and source not in NAMES and Path(source).is_dir()
    except (OSError, ValueError):  # no path
        return False


def is_tokenized(source: str) -> bool:
    """Return whether a source holds token ids rather than text."""
    return source not in NAMES and _ending(source) == TOKEN_EXTENSION


def check_source(source: str, *, flag: str) -> None:
    """Raise BadInput for an unknown name or extension and for a missing file."""
    if source in NAMES or is_directory(source):
        return
    if is_file_name(source):
        check_file(Path(source), flag=flag)
    elif not is_hub_id(source) or os.path.lexists(source):
        raise BadInput(f"{flag}: {shown(source)} is not known, expected {EXPECTED}")


def warn_of_unused_columns(sources: Iterable[str], columns: tuple[str, ...]) -> None:
    """Warn that --text-column has no effect where no source has columns."""
    if columns and all(
        source in NAMES or is_tokenized(source) or format_of(Path(source)) == ".txt" for source in sources
    ):
        logger.warning("%s: ignored, no text has columns to choose from", FLAG)


def calibration_documents(source: str, encode: Encoder, *, flag: str, columns: tuple[str, ...] = ()) -> Documents:
    """Open the documents that calibration sequences are drawn from. Raises BadInput if they cannot be read."""
    assert not is_tokenized(source)
    check_source(source, flag=flag)
    if source in HUB:
        split = HUB[source].calibration
        rows = hub_rows(source, split, flag=flag)
        if split.separator is None:
            return Documents(count=len(rows), read=rows.__getitem__, continuous=False)
        return _continuous(split.separator.join(rows))
    if source == BUILTIN:
        return _continuous(read_text(_builtin_path("calibration.txt"), flag=flag))
    return _documents(source, _reading(encode, flag, columns), evaluated=False)


def evaluation_text(source: str, encode: Encoder, *, flag: str, columns: tuple[str, ...] = ()) -> EvaluationText:
    """Read the text of a source by the papers' protocol; the rows of a file are joined by two newlines.

    Raises BadInput if it cannot be read.
    """
    assert not is_tokenized(source)
    check_source(source, flag=flag)
    if source in HUB:
        split = HUB[source].evaluation
        rows = islice(hub_rows(source, split, flag=flag), split.rows)
        assert split.separator is not None
        return EvaluationText(split.separator.join(rows), split.windows)
    if source == BUILTIN:
        return EvaluationText(read_text(_builtin_path("evaluation.txt"), flag=flag), None)
    documents = _documents(source, _reading(encode, flag, columns), evaluated=True)
    return EvaluationText(documents.separator.join(map(documents.read, range(documents.count))), None)


def _reading(encode: Encoder, flag: str, columns: tuple[str, ...]) -> Reading:
    return Reading(flag=flag, columns=columns, chat=lambda conversation: encode.chat_text(conversation))


def _documents(source: str, reading: Reading, *, evaluated: bool) -> Documents:
    if is_directory(source):
        return folder_documents(Path(source), reading, evaluated=evaluated)
    if not is_file_name(source):
        return hub_documents(source, reading, evaluated=evaluated)
    path = Path(source)
    kind = format_of(path)
    if kind == ".txt":
        return _continuous(read_text(path, flag=reading.flag))
    if kind in (".json", ".jsonl"):
        return json_documents(path, reading)
    return table_documents([path], source, reading)


def _continuous(text: str) -> Documents:
    return Documents(count=1, read=lambda _: text, continuous=True)


def _builtin_path(name: str) -> Path:
    return Path(__file__).parent / "builtin" / name


def _ending(source: str) -> str:
    return Path(source).suffix
