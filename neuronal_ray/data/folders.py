"""Directories with text: what `datasets.save_to_disk` writes, or files of one format, by split where they have one."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import check_path, read_json
from neuronal_ray.data.documents import Documents, Reading
from neuronal_ray.data.file_formats import FORMATS, format_of, open_file
from neuronal_ray.data.json_rows import json_documents
from neuronal_ray.data.splits import choose_split, split_in
from neuronal_ray.data.tables import table_documents

_STATE, _SPLITS = "state.json", "dataset_dict.json"

logger = logging.getLogger(__name__)


def folder_documents(folder: Path, reading: Reading, *, evaluated: bool) -> Documents:
    """Return what is in a directory as documents. Raises BadInput if that is no text."""
    flag = reading.flag
    if (folder / _SPLITS).exists():
        splits = read_json(folder / _SPLITS, dict[str, list[str]], flag=flag).get("splits", [])
        name = choose_split(splits, evaluated=evaluated, source=str(folder), flag=flag)
        _check_inside(folder / _SPLITS, name, flag=flag)
        return folder_documents(folder / name, reading, evaluated=evaluated)
    if (folder / _STATE).exists():
        return table_documents(_saved_files(folder, flag=flag), str(folder), reading)
    paths = _chosen_files(folder, reading, evaluated=evaluated)
    kind = format_of(paths[0])
    if kind == ".txt":
        return Documents(count=len(paths), read=lambda index: read_text(paths[index], flag=flag), continuous=False)
    if kind not in (".json", ".jsonl"):
        return table_documents(paths, str(folder), reading)
    return _joined([json_documents(path, reading) for path in paths])


def read_text(path: Path, *, flag: str) -> str:
    """Read a text file as it is, line ends included. Raises BadInput if it is no UTF-8."""
    with open_file(path, flag=flag) as file:
        content = file.read()
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{flag}: {str(path)!r} is not UTF-8 text ({error})") from error


def _saved_files(folder: Path, *, flag: str) -> list[Path]:
    """Return the Arrow files of a data set that was saved to disk."""
    state = read_json(folder / _STATE, dict[str, Any], flag=flag)
    files = state.get("_data_files")
    entries = files if isinstance(files, list) else []
    names = [file["filename"] for file in entries if isinstance(file, dict) and isinstance(file.get("filename"), str)]
    if not names or len(names) < len(entries):
        raise BadInput(f"{flag}: {folder / _STATE}: _data_files: {files!r:.60}, expected a list of files")
    for name in names:
        _check_inside(folder / _STATE, name, flag=flag)
    return [folder / name for name in names]


def _check_inside(path: Path, name: str, *, flag: str) -> None:
    check_path(Path(name), flag=flag)
    if Path(name).name != name:
        raise BadInput(f"{flag}: {path} names {name!r:.60}, expected a name in its directory")


def _chosen_files(folder: Path, reading: Reading, *, evaluated: bool) -> list[Path]:
    """Return the files of text, of the split to use where their names have one. Raises BadInput if there is none."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    texts = [path for path in found if format_of(path) is not None]
    place = f"{reading.flag}: {str(folder)!r}"
    if not texts:
        raise BadInput(f"{place} is a directory without files of text, expected some ending in {', '.join(FORMATS)}")
    splits = [split_in(path.name) or split_in(path.parent.name) for path in texts]
    named = sorted({split for split in splits if split is not None})
    if named:
        used = choose_split(named, evaluated=evaluated, source=str(folder), flag=reading.flag)
        texts = [path for path, split in zip(texts, splits, strict=True) if split == used]
    kinds = sorted({format_of(path) or "" for path in texts})
    if len(kinds) > 1:
        raise BadInput(f"{place} has files of several formats, {', '.join(kinds)}; name one of them")
    if ignored := [path.name for path in found if path not in texts]:
        _say(f"{place}: {len(texts)} files are read, ignored: {', '.join(ignored[:8])}{' ..' * (len(ignored) > 8)}")
    return texts


def _joined(parts: list[Documents]) -> Documents:
    ends = [sum(part.count for part in parts[: number + 1]) for number in range(len(parts))]

    def read(index: int) -> str:
        part = next(number for number, end in enumerate(ends) if index < end)
        return parts[part].read(index - (ends[part] - parts[part].count))

    return Documents(count=ends[-1], read=read, continuous=False, separator=parts[0].separator)


@cache
def _say(message: str) -> None:
    """Say something once, however often the source is read."""
    logger.warning("%s", message)
