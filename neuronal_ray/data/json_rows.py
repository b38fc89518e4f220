"""Rows of JSON: an object on each line, or one list of objects."""

from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import parse_json
from neuronal_ray.data.columns import MESSAGES, STRING, Column, choose_column, is_message, text_of
from neuronal_ray.data.documents import Documents, Reading
from neuronal_ray.data.file_formats import format_of, open_file

_EXPECTED = "expected one JSON object with a string field {!r} on each line"
Row = Mapping[str, Any]


def json_documents(path: Path, reading: Reading) -> Documents:
    """Return the rows of a JSON file as documents. Raises BadInput with the line of a row that has no text."""
    file = open_file(path, flag=reading.flag)
    if format_of(path) == ".json" and _begins_a_list(file):
        return _list_documents(file.read(), path, reading)
    place = f"{reading.flag}: {str(path)!r} line "
    column: Column | None = None
    offsets = array("q")
    offset = 0
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = _row(line, f"{place}{number}", column)
            column = column or choose_column(_columns(row), reading, source=f"{path} line {number}")
            _check(row, column, f"{place}{number}")
            offsets.append(offset)
        offset += len(line)
    chosen = column

    def read(index: int) -> str:
        assert chosen is not None
        file.seek(offsets[index])
        value = _row(file.readline(), place, chosen)[chosen.name]
        return text_of(value, chosen, reading, place=f"{reading.flag}: row {index + 1} of {str(path)!r}")

    separator = "" if chosen is None else chosen.separator
    return Documents(count=len(offsets), read=read, continuous=False, separator=separator)


def _list_documents(content: bytes, path: Path, reading: Reading) -> Documents:
    place = f"{reading.flag}: {str(path)!r}"
    rows = parse_json(content, place=place)
    assert isinstance(rows, list)
    if not rows:
        raise BadInput(f"{place} is an empty list, expected objects")
    column: Column | None = None
    for number, row in enumerate(rows, start=1):
        where = f"{reading.flag}: row {number} of {str(path)!r}"
        if not isinstance(row, dict):
            raise BadInput(f"{where} is a JSON {type(row).__name__}, expected an object")
        column = column or choose_column(_columns(row), reading, source=f"{path} row {number}")
        _check(row, column, where)
    assert column is not None
    chosen = column

    def read(index: int) -> str:
        place = f"{reading.flag}: row {index + 1} of {str(path)!r}"
        return text_of(rows[index][chosen.name], chosen, reading, place=place)

    return Documents(count=len(rows), read=read, continuous=False, separator=chosen.separator)


def _begins_a_list(file: IO[bytes]) -> bool:
    first = b" "
    while first.isspace():
        first = file.read(1)
    file.seek(0)
    return first == b"["


def _row(line: bytes, place: str, column: Column | None) -> Row:
    expected = _EXPECTED.format("text" if column is None else column.name)
    try:
        row = parse_json(line.decode("utf-8"), place=place)
    except UnicodeDecodeError as error:
        raise BadInput(f"{place} is not JSON ({error}), {expected}") from error
    except BadInput as error:
        raise BadInput(f"{error}, {expected}") from error
    if not isinstance(row, dict):
        raise BadInput(f"{place} is a JSON {type(row).__name__}, {expected}")
    return row


def _columns(row: Row) -> list[Column]:
    return [Column(name, _kind(value)) for name, value in row.items()]


def _kind(value: object) -> str:
    if isinstance(value, str):
        return STRING
    return MESSAGES if isinstance(value, list) and value and all(map(is_message, value)) else type(value).__name__


def _check(row: Row, column: Column, place: str) -> None:
    expected = _EXPECTED.format(column.name)
    if column.name not in row:
        raise BadInput(f"{place} has the fields {list(row)!r:.300}, {expected}")
    if (kind := _kind(row[column.name])) != column.kind:
        raise BadInput(f"{place} has a {column.name!r} of type {kind}, {expected}")
