"""The one reader of the Parquet files of runs and sweeps: in the types of their schema, or one line saying why not."""

from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import check_file, checked

T = TypeVar("T")


def read_table(path: Path, schema: pa.Schema, *, flag: str, may_be_null: Collection[str] = ()) -> pa.Table:
    """Read the columns of `schema`, in its types; whole numbers may have other widths, other columns are ignored.

    Raises BadInput for a file that is no Parquet, and for columns that are missing, there twice, of another type, or
    that have nulls and are not among `may_be_null`.
    """
    check_file(path, flag=flag)
    place = f"{flag}: {path}"
    try:
        with pq.ParquetFile(path) as file:
            given = file.schema_arrow
            _check_columns(given, schema, place=place)
            table = file.read(columns=schema.names).select(schema.names)
        table.validate(full=True)
        table = table.cast(schema)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise BadInput(f"{place} cannot be read as Parquet ({reason:.200})") from error
    for name in schema.names:
        if name not in may_be_null and (table.column(name).null_count or _has_nulls_inside(table.column(name))):
            raise BadInput(f"{place} has nulls in the column {name}, expected none")
    return table


def read_rows(
    path: Path, schema: pa.Schema, kind: type[T], *, flag: str, may_be_null: Collection[str] = ()
) -> tuple[T, ...]:
    """Read the rows as instances of the dataclass `kind`, whose fields are the columns of `schema`; see `checked`."""
    rows = read_table(path, schema, flag=flag, may_be_null=may_be_null).to_pylist()
    return tuple(checked(row, kind, place=f"{flag}: row {number} of {path}") for number, row in enumerate(rows, 1))


def _check_columns(given: pa.Schema, wanted: pa.Schema, *, place: str) -> None:
    counts = Counter(given.names)
    for field in wanted:
        if counts[field.name] == 0:
            raise BadInput(f"{place} lacks the column {field.name}, expected {', '.join(wanted.names)}")
        if counts[field.name] > 1:
            raise BadInput(f"{place} has the column {field.name} {counts[field.name]} times, expected it once")
        if not _is_like(given.field(field.name).type, field.type):
            found = given.field(field.name).type
            raise BadInput(f"{place}: the column {field.name} is {found}, expected {field.type}")


def _is_like(given: pa.DataType, wanted: pa.DataType) -> bool:
    """Tell whether values of one type are values of the other: of another width, as whole numbers, or null."""
    if types.is_null(given):
        return True
    if types.is_list(wanted):
        return (types.is_list(given) or types.is_large_list(given)) and _is_like(given.value_type, wanted.value_type)
    if types.is_floating(wanted):
        return bool(types.is_floating(given) or types.is_integer(given))
    if types.is_integer(wanted):
        return bool(types.is_integer(given))
    if types.is_string(wanted):
        return bool(types.is_string(given) or types.is_large_string(given))
    return bool(given == wanted)


def _has_nulls_inside(column: pa.ChunkedArray) -> bool:
    """Tell whether a list of the column has a null."""
    return types.is_list(column.type) and any(chunk.flatten().null_count for chunk in column.chunks)
