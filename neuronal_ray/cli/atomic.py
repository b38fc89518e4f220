"""Outputs: checked at the start, written under a temporary name in the same directory, then renamed.

They appear whole or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import check_path, parse_json, read_text


def check_output(
    path: Path,
    *,
    kind: Literal["directory", "file"],
    overwrite: bool = False,
    earlier: Callable[[Path], bool] | None = None,
    models: Iterable[str | Path] = (),
    inputs: Iterable[str | Path] = (),
    flag: str = "--output",
) -> None:
    """Raise BadInput when `path` cannot become the output of a command, before anything expensive is done.

    What exists is kept if `earlier` says that the same command wrote it, for it to go on or write it again. With
    `overwrite` a file is replaced, and a directory if it is empty or an earlier run wrote it. For `models` and
    `inputs` see `check_apart`.
    """
    check_path(path, flag=flag)
    try:
        check_apart(path, models=models, inputs=inputs, flag=flag)
        known = earlier is not None and path.exists() and earlier(path)
        if path.is_symlink() and not known:
            raise BadInput(f"{flag}: {path} is a link; name the {kind} itself")
        if path.exists() and kind == "directory":
            _check_directory(path, known=known, overwrite=overwrite, flag=flag)
        elif path.exists():
            _check_file(path, overwrite=overwrite or known, flag=flag)
        _check_writable(_real(path), kind=kind, flag=flag)
    except OSError as error:
        raise BadInput(f"{flag}: cannot write to {path}: {error.strerror}") from error


def check_apart(
    path: Path, *, models: Iterable[str | Path] = (), inputs: Iterable[str | Path] = (), flag: str = "--output"
) -> None:
    """Raise BadInput when writing `path` would change or remove what is read.

    It may be neither in nor above one of the directories `models` and the files behind their links, nor be one of
    `inputs` or above it. Names in both that are no paths (of the hub, of data sets) are ignored.
    """
    output = _real(path)
    for model in (Path(name) for name in models if _exists(Path(name) / "config.json")):
        directory = _real(model)
        if output == directory or directory in output.parents:
            raise BadInput(f"{flag}: {path} is in {model}, the model that is read; name another")
        with suppress(PermissionError):  # refused where the model is read
            if any(output == read or output in read.parents for read in (directory, *map(_real, model.iterdir()))):
                raise BadInput(f"{flag}: {path} is or contains files of {model}, the model that is read; name another")
    for given in (Path(name) for name in inputs if _exists(name)):
        if output == (read := _real(given)) or output in read.parents:
            raise BadInput(f"{flag}: {path} is or contains {given}, which is read; name another")


def _real(path: Path) -> Path:
    """Return the path without links and `..`; unlike Path.resolve it accepts circles of links."""
    return Path(os.path.realpath(path))


def _exists(name: str | Path) -> bool:
    """Return whether there is a file of that name; False for what is no path."""
    try:
        return Path(name).exists()
    except OSError:  # too long, for example: refused where it is read
        return False


def _check_directory(path: Path, *, known: bool, overwrite: bool, flag: str) -> None:
    if not path.is_dir():
        raise BadInput(f"{flag}: {path} is not a directory")
    if known:
        return
    if not overwrite:
        raise BadInput(f"{flag}: {path} exists already; name another directory or add --overwrite")
    if any(path.iterdir()) and not (path / "pruning.json").is_file():
        raise BadInput(f"--overwrite: {path} holds no pruning.json, so no earlier run wrote it; remove it yourself")
    if _real(path) in (here := Path.cwd(), *here.parents):
        raise BadInput(f"--overwrite: {path} is the current directory or above it; go elsewhere to replace it")


def _check_file(path: Path, *, overwrite: bool, flag: str) -> None:
    if not path.is_file():
        raise BadInput(f"{flag}: {path} is {'a directory' if path.is_dir() else 'no regular file'}, expected a file")
    if not overwrite:
        raise BadInput(f"{flag}: {path} exists already; name another file or add --overwrite")


def _check_writable(path: Path, *, kind: Literal["directory", "file"], flag: str) -> None:
    """Create and remove what the command will: missing directories, and an entry with the longest temporary name."""
    if kind == "file" and not path.parent.is_dir():
        raise BadInput(f"{flag}: no directory {path.parent}")
    existing = next(folder for folder in path.parents if os.path.lexists(folder))
    if not existing.is_dir():
        raise BadInput(f"{flag}: cannot write to {path}: {existing} is not a directory")
    with _parents(path):
        probe = _replaced(path)
        probe.mkdir()
        probe.rmdir()


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the missing directories above `path`; remove them afterwards if `path` is not there."""
    missing = [folder for folder in path.parents if not folder.exists()]  # innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if not path.exists():
            for folder in missing:
                with suppress(OSError):  # not empty: another process wrote there
                    folder.rmdir()


def has_format(path: Path, kind: str) -> bool:
    """Return whether a JSON file is an object whose "format" is `kind`."""
    try:
        content = parse_json(read_text(path, flag="--output"), place="--output")
    except BadInput:
        return False
    return isinstance(content, dict) and content.get("format") == kind


def staging_of(path: Path) -> Path:
    """Return the temporary name under which this process writes `path`."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _replaced(path: Path) -> Path:
    """Return the temporary name of what was at `path`."""
    return path.with_name(f".{path.name}.replaced-{os.getpid()}")


@contextmanager
def staged(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` when the body succeeds and is removed when it does not.

    Raises FileExistsError when there is something at `path` by then, unless it is to `overwrite` a directory.
    """
    path = _real(path)
    staging = staging_of(path)
    with _parents(path):
        try:
            staging.mkdir()
        except OSError as error:
            raise BadInput(f"--output: cannot write to {path.parent}: {error.strerror}") from error
        try:
            yield staging
            if path.exists():
                if not overwrite:
                    raise FileExistsError(f"--output: {path} appeared while this command ran")
                replaced = _replaced(path)
                path.rename(replaced)
                staging.rename(path)
                shutil.rmtree(replaced)
            else:
                staging.rename(path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file name that becomes `path` when the body succeeds and is removed when it does not."""
    path = path.absolute()
    staging = staging_of(path)
    try:
        yield staging
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    with staged_file(path) as staging:
        staging.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
