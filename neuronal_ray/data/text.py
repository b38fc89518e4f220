"""Text of a source: a data set on the Hugging Face hub, the sample in this package (`builtin`) or a local file.

Functions take the command-line flag that named the source, for their error messages.
"""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput

TOKEN_EXTENSION = ".safetensors"
EXTENSIONS = (".txt", ".jsonl", ".parquet", TOKEN_EXTENSION)
BUILTIN = "builtin"
COLUMN = "text"


@dataclass(frozen=True, kw_only=True)
class HubSplit:
    """One split of a hub data set: its first `rows` rows (None: all) as one text, joined by `separator`.

    Without a separator each row is a document. At most `windows` windows are evaluated (None: all).
    """

    split: str
    data_file: str | None = None
    separator: str | None = None
    rows: int | None = None
    windows: int | None = None


@dataclass(frozen=True, kw_only=True)
class HubText:
    """A data set on the hub that needs no loading script, and the column with its text."""

    repository: str
    configuration: str | None = None
    revision: str | None = None
    column: str = COLUMN
    calibration: HubSplit
    evaluation: HubSplit


# Splits and separators are those of Wanda's (ICLR 2024) and GPTQ's (ICLR 2023) data loaders, ids those of datasets 4:
# C4 without a configuration, because `en` expects all of its shards; PTB from the hub's own Parquet conversion, because
# its main branch is a script.
HUB = {
    "c4": HubText(
        repository="allenai/c4",
        calibration=HubSplit(split="train", data_file="en/c4-train.00000-of-01024.json.gz"),
        evaluation=HubSplit(
            split="validation",
            data_file="en/c4-validation.00000-of-00008.json.gz",
            separator=" ",
            rows=1100,
            windows=256,
        ),
    ),
    "wikitext2": HubText(
        repository="Salesforce/wikitext",
        configuration="wikitext-2-raw-v1",
        calibration=HubSplit(split="train", separator=" "),
        evaluation=HubSplit(split="test", separator="\n\n"),
    ),
    "ptb": HubText(
        repository="ptb-text-only/ptb_text_only",
        revision="refs/convert/parquet",
        column="sentence",
        calibration=HubSplit(split="train", separator=" "),
        evaluation=HubSplit(split="test", separator=" "),
    ),
}
NAMES = (*HUB, BUILTIN)


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Calibration text: `count` documents, each read when it is drawn.

    `continuous`: there is one continuous text, so that only the start of a sequence is drawn, not the document.
    """

    count: int
    read: Callable[[int], str]
    continuous: bool


@dataclass(frozen=True)
class EvaluationText:
    """One text to be divided into windows, of which at most `windows` are evaluated (None: all)."""

    text: str
    windows: int | None


def is_file_name(source: str) -> bool:
    """Return whether a source is a path (judged by its extension) rather than a name."""
    return source not in NAMES and Path(source).suffix in EXTENSIONS


def is_tokenized(source: str) -> bool:
    """Return whether a source holds token ids rather than text."""
    return is_file_name(source) and Path(source).suffix == TOKEN_EXTENSION


def check_source(source: str, *, flag: str) -> None:
    """Raise BadInput for an unknown name or extension and for a missing file."""
    if source in NAMES:
        return
    if not is_file_name(source):
        expected = f"one of {', '.join(NAMES)}, or a file ending in {', '.join(EXTENSIONS)}"
        raise BadInput(f"{flag}: {source!r} is not known, expected {expected}")
    _check_file(Path(source), flag=flag)


def calibration_documents(source: str, *, flag: str) -> Documents:
    """Open the documents that calibration sequences are drawn from. Raises BadInput if they cannot be read."""
    assert not is_tokenized(source)
    check_source(source, flag=flag)
    if source in HUB:
        split = HUB[source].calibration
        rows = _hub_rows(source, split, flag=flag)
        if split.separator is None:
            return Documents(count=len(rows), read=rows.__getitem__, continuous=False)
        return _continuous(split.separator.join(rows))
    path = _builtin_path("calibration.txt") if source == BUILTIN else Path(source)
    if path.suffix == ".jsonl":
        offsets = array("q", (row.offset for row in _json_rows(path, flag=flag)))
        return Documents(count=len(offsets), read=partial(_json_text_at, path, offsets), continuous=False)
    if path.suffix == ".parquet":
        column = _parquet_column(path, flag=flag)
        return Documents(count=len(column), read=lambda index: str(column[index]), continuous=False)
    return _continuous(_read_text(path, flag=flag))


def evaluation_text(source: str, *, flag: str) -> EvaluationText:
    """Read the text of a source by the papers' protocol; the rows of a file are joined by two newlines.

    Raises BadInput if it cannot be read.
    """
    assert not is_tokenized(source)
    check_source(source, flag=flag)
    if source in HUB:
        split = HUB[source].evaluation
        rows = islice(_hub_rows(source, split, flag=flag), split.rows)
        assert split.separator is not None
        return EvaluationText(split.separator.join(rows), split.windows)
    path = _builtin_path("evaluation.txt") if source == BUILTIN else Path(source)
    if path.suffix == ".txt":
        return EvaluationText(_read_text(path, flag=flag), None)
    texts: Iterable[str]
    if path.suffix == ".jsonl":
        texts = (row.text for row in _json_rows(path, flag=flag))
    else:
        texts = (str(value) for value in _parquet_column(path, flag=flag))
    return EvaluationText("\n\n".join(texts), None)


def one_line(error: Exception) -> str:
    """Return the message of a library's error without its line breaks."""
    return " ".join(str(error).split())


def _continuous(text: str) -> Documents:
    return Documents(count=1, read=lambda _: text, continuous=True)


def _builtin_path(name: str) -> Path:
    return Path(__file__).parent / "builtin" / name


def _check_file(path: Path, *, flag: str) -> None:
    if path.is_dir():
        raise BadInput(f"{flag}: {str(path)!r} is a directory, expected a file")
    if not path.is_file():
        raise BadInput(f"{flag}: {str(path)!r} does not exist, expected a file")


def _hub_rows(source: str, split: HubSplit, *, flag: str) -> Sequence[str]:
    """Open the text column of a split, memory-mapped by datasets. Raises BadInput if the hub does not provide it."""
    import datasets
    from huggingface_hub.errors import HTTPError

    hub_text = HUB[source]
    try:
        rows = datasets.load_dataset(
            hub_text.repository,
            hub_text.configuration,
            data_files=None if split.data_file is None else {split.split: split.data_file},
            split=split.split,
            revision=hub_text.revision,
        )
    # OSError covers connections, HTTP statuses and missing files; HTTPError an interrupted download;
    # datasets raises ValueError offline when its cache has another part of the data set.
    except (OSError, HTTPError, datasets.exceptions.DatasetsError, ValueError) as error:
        raise BadInput(
            f"{flag}: {source!r} could not be reached on the Hugging Face hub as {hub_text.repository}"
            f" ({one_line(error)}); a local file ending in {', '.join(EXTENSIONS)} can be given instead"
        ) from error
    texts: Sequence[str] = rows[hub_text.column]
    return texts


def _read_text(path: Path, *, flag: str) -> str:
    """Read a text file as it is, line ends included."""
    _check_file(path, flag=flag)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{flag}: {str(path)!r} is not UTF-8 text ({error})") from error


@dataclass(frozen=True)
class _JsonRow:
    offset: int
    text: str


def _json_rows(path: Path, *, flag: str) -> Iterator[_JsonRow]:
    """Yield the text of each row of a JSON Lines file and the byte at which it begins; skip blank lines."""
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _JsonRow(offset, _json_text(line, path, number, flag=flag))
            offset += len(line)


def _json_text(line: bytes, path: Path, number: int, *, flag: str) -> str:
    expected = f"expected one JSON object with a string field {COLUMN!r} on each line"
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:
        raise BadInput(f"{flag}: {str(path)!r} line {number} is not JSON ({error}), {expected}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{flag}: {str(path)!r} line {number} is a JSON {type(row).__name__}, {expected}")
    if COLUMN not in row:
        raise BadInput(f"{flag}: {str(path)!r} line {number} has the fields {list(row)}, {expected}")
    text = row[COLUMN]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise BadInput(f"{flag}: {str(path)!r} line {number} has a {COLUMN!r} of type {kind}, {expected}")
    return text


def _json_text_at(path: Path, offsets: Sequence[int], index: int) -> str:
    """Read one row of a file that `_json_rows` has checked."""
    with path.open("rb") as file:
        file.seek(offsets[index])
        text: str = json.loads(file.readline())[COLUMN]
    return text


def _parquet_column(path: Path, *, flag: str) -> Any:
    """Read the text column of a Parquet file, and no other, as an Arrow array."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            table = file.read(columns=[COLUMN])
    except (pyarrow.ArrowException, OSError) as error:
        raise BadInput(f"{flag}: {str(path)!r} is not a Parquet file ({one_line(error)})") from error
    if COLUMN not in names:
        raise BadInput(f"{flag}: {str(path)!r} has the columns {names}, expected a column {COLUMN!r}")
    column = table[COLUMN]
    if column.type not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise BadInput(f"{flag}: column {COLUMN!r} of {str(path)!r} is {column.type}, expected string")
    if column.null_count > 0:
        row = column.is_null().index(True).as_py() + 1
        raise BadInput(f"{flag}: row {row} of {str(path)!r} has no {COLUMN!r}, expected a string in each row")
    return column
