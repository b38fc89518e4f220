"""The formats of files with text, told by their names, and such files opened and decompressed."""

import bz2
import gzip
import lzma
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import check_file
from neuronal_ray.data.documents import one_line

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def format_of(path: Path) -> str | None:
    """Return the format of a file, compressed or not; None where its name says none."""
    name = Path(path.stem) if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower() if name.suffix.lower() in FORMATS else None


def name_of(path: Path) -> str:
    """Return the name of a file without its format and compression."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def open_file(path: Path, *, flag: str) -> IO[bytes]:
    """Open a file; what is compressed is decompressed to a temporary one. Raises BadInput if it cannot be read."""
    check_file(path, flag=flag)
    suffix = path.suffix.lower()
    if suffix not in COMPRESSED:
        return path.open("rb")
    openers: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
    target = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as its rows are read)
    try:
        with openers[suffix](path) as file:
            shutil.copyfileobj(file, target, 2**20)
    except (OSError, EOFError, ValueError, lzma.LZMAError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        target.close()
        raise BadInput(f"{flag}: {str(path)!r} is not a whole {suffix} file ({one_line(error)})") from error
    target.seek(0)
    return target


def _zstd(path: Path) -> Any:
    import pyarrow  # decompresses without a further package

    return pyarrow.input_stream(str(path), compression="zstd")
