"""Rows of Parquet, Arrow and CSV files, and of tables that are open: their column with text as Arrow has it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import check_file
from neuronal_ray.data.columns import MESSAGES, STRING, TEXT, Column, choose_column, text_of
from neuronal_ray.data.documents import Documents, Reading, one_line
from neuronal_ray.data.file_formats import COMPRESSED, format_of, open_file

_NAMES = {".parquet": "a Parquet", ".arrow": "an Arrow", ".csv": "a CSV"}


def table_documents(paths: Sequence[Path], source: str, reading: Reading) -> Documents:
    """Return the rows of one or several files of the same format as documents. Raises BadInput if there is no text."""
    chunks: list[Any] = []
    column: Column | None = None
    for path in paths:
        kind = format_of(path) or ".arrow"
        with _reading(path, kind, reading):
            table = _Table(path, kind, reading)
        if column is None:
            column = choose_column(table.columns, reading, source=source)
        elif column not in table.columns:
            raise BadInput(f"{reading.flag}: {str(path)!r} has no column {column.name!r} of {column.kind}, others do")
        with _reading(path, kind, reading):
            values = table.values(column.name)
            values.validate(full=True)
        chunks.append(values)
    assert column is not None
    return column_documents(chunks, column, source, reading)


def open_table_documents(table: Any, source: str, reading: Reading) -> Documents:
    """Return the rows of an Arrow table as documents. Raises BadInput if there is no text."""
    columns = [Column(field.name, _kind(field.type)) for field in table.schema]
    column = choose_column(columns, reading, source=source)
    return column_documents([table.column(column.name)], column, source, reading)


def column_documents(chunks: Sequence[Any], column: Column, source: str, reading: Reading) -> Documents:
    """Return the values of a column, in one or several parts, as documents. Raises BadInput for a row without one."""
    starts = [0]
    for chunk in chunks:
        if chunk.null_count:
            row = starts[-1] + chunk.is_null().index(True).as_py() + 1
            raise BadInput(
                f"{reading.flag}: row {row} of {source!r} has no {column.name!r}, expected {column.kind} in each row"
            )
        starts.append(starts[-1] + len(chunk))

    def read(index: int) -> str:
        part = next(number for number, end in enumerate(starts[1:]) if index < end)
        value = chunks[part][index - starts[part]].as_py()
        return text_of(value, column, reading, place=f"{reading.flag}: row {index + 1} of {source!r}")

    return Documents(count=starts[-1], read=read, continuous=False, separator=column.separator)


class _Table:
    """A file whose columns are known, and of which one is read."""

    def __init__(self, path: Path, kind: str, reading: Reading) -> None:
        import pyarrow
        from pyarrow import csv, ipc, parquet

        check_file(path, flag=reading.flag)
        self._kind = kind
        packed = path.suffix.lower() in COMPRESSED
        file: Any = open_file(path, flag=reading.flag) if packed else pyarrow.memory_map(str(path))
        self._table: Any = None
        if kind == ".parquet":
            self._table = parquet.ParquetFile(file)
            schema = self._table.schema_arrow
        elif kind == ".arrow":
            try:
                self._table = ipc.open_file(file).read_all()
            except pyarrow.ArrowInvalid:  # a stream, as the cache of `datasets` has it
                file.seek(0)
                self._table = ipc.open_stream(file).read_all()
            schema = self._table.schema
        else:
            self._content = pyarrow.py_buffer(file.read())
            schema = csv.open_csv(
                pyarrow.BufferReader(self._content), parse_options=csv.ParseOptions(newlines_in_values=True)
            ).schema
        words = (TEXT, *reading.columns) if kind == ".csv" else ()  # in CSV any value can be text
        self.columns = [Column(field.name, STRING if field.name in words else _kind(field.type)) for field in schema]

    def values(self, name: str) -> Any:
        """Read the column."""
        if self._kind == ".parquet":
            return _plain(self._table.read(columns=[name])[name])
        if self._kind == ".arrow":
            return _plain(self._table[name])
        import pyarrow
        from pyarrow import csv

        return csv.read_csv(
            pyarrow.BufferReader(self._content),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(include_columns=[name], column_types={name: pyarrow.string()}),
        )[name]


def _plain(values: Any) -> Any:
    """Return values that are stored as numbers of a dictionary as strings."""
    import pyarrow

    return values.cast(values.type.value_type) if pyarrow.types.is_dictionary(values.type) else values


def _kind(kind: Any) -> str:
    import pyarrow

    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return STRING
    if (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type):
        fields = {field.name for field in kind.value_type}
        if {"role", "content"} <= fields:
            return MESSAGES
    return f"{kind!s:.80}"


@contextmanager
def _reading(path: Path, kind: str, reading: Reading) -> Iterator[None]:
    """Turn the errors of pyarrow into a BadInput that names the file."""
    import pyarrow

    try:
        yield
    except BadInput:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise BadInput(
            f"{reading.flag}: {str(path)!r} is not {_NAMES[kind]} file that can be read ({one_line(error):.300})"
        ) from error
