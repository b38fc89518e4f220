"""Outputs that appear whole or not at all: written under a temporary name in the same directory, then renamed."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from neuronal_ray.cli.errors import BadInput


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise BadInput when `path` cannot become the output directory."""
    if path.exists() and not overwrite:
        raise BadInput(f"--output: {path} exists already; name another directory or add --overwrite")
    if path.exists() and not path.is_dir():
        raise BadInput(f"--output: {path} is not a directory")
    if path.exists() and any(path.iterdir()) and not (path / "pruning.json").is_file():
        raise BadInput(f"--overwrite: {path} holds no pruning.json, so no earlier run wrote it; remove it yourself")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"--output: cannot write to {parent}")


def staging_of(path: Path) -> Path:
    """Return the temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the body succeeds and is removed when it does not."""
    path = path.absolute()
    staging = staging_of(path)
    missing = [folder for folder in path.parents if not folder.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
    except OSError as error:
        raise BadInput(f"--output: cannot write to {path.parent}: {error.strerror}") from error
    try:
        yield staging
        if path.exists():
            replaced = path.with_name(f".{path.name}.replaced-{os.getpid()}")
            path.rename(replaced)
            staging.rename(path)
            shutil.rmtree(replaced)
        else:
            staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not path.exists():
            for folder in missing:
                with suppress(OSError):  # not empty: another process wrote there
                    folder.rmdir()


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name that becomes `path` when the body succeeds and is removed when it does not."""
    path = path.absolute()
    staging = staging_of(path)
    if not path.parent.is_dir():
        raise BadInput(f"--output: no directory {path.parent}")
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    temporary = staging_of(path)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
