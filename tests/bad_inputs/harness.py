"""Run one case in this process, and say what is wrong with how the command ended."""

import hashlib
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from bad_inputs.case import Case
from bad_inputs.good import command_line, prepare

SECONDS = 20
"""How long a command may take. The slowest of these cases takes about two seconds on an idle machine."""
_LONGEST_LINE = 2000


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a case ended: `fault` is empty when it ended as it should, `line` the last line that was printed."""

    name: str
    command: str
    reader: str
    seconds: float
    fault: str
    line: str


class _HungError(BaseException):
    """The command did not end in time."""


@dataclass(frozen=True, kw_only=True)
class _Ended:
    code: int | None
    out: str
    err: str


def run_case(case: Case, *, good: Path, work: Path) -> Outcome:
    """Run a case in a new folder `work`, which is removed afterwards."""
    begin = time.monotonic()
    folder = work / "folder"
    temporary = work / "tmp"
    temporary.mkdir(parents=True)
    try:
        arguments = prepare(case.command, good, folder)
        given = case.damage(folder)
        arguments = [*given] if case.whole_line else [*arguments, *given]
        before = _snapshot(work)
        with _surroundings(folder / "here", temporary):
            ended = _call(lambda: command_line(*arguments))
        after = _snapshot(work)
    finally:
        _make_removable(work)
        shutil.rmtree(work)
    lines = [line for line in ended.err.splitlines() if not line.startswith("[")]
    fault = _fault(case, ended, lines, before, after)
    return Outcome(
        name=case.name,
        command=case.command or "neuronal-ray",
        reader=case.reader,
        seconds=time.monotonic() - begin,
        fault=fault,
        line=(lines or [""])[-1][:300],
    )


def _fault(case: Case, ended: _Ended, lines: list[str], before: dict[str, str], after: dict[str, str]) -> str:
    if ended.code is None:
        return "hang"
    if "Traceback (most recent call last)" in ended.err:
        return "traceback"
    if case.harmless or (case.either and ended.code == 0):
        return "" if ended.code == 0 else f"harmless, but exit code {ended.code}"
    if ended.code == 0:
        return "silent success"
    if ended.code != 2:
        return f"exit code {ended.code}"
    if left := sorted(after.keys() - before.keys()):
        return f"left {', '.join(left[:3])}"
    if touched := sorted(name for name in before if after.get(name) != before[name]):
        return f"touched {', '.join(touched[:3])}"
    errors = [line for line in lines if line.startswith("neuronal-ray") and ": error: " in line]
    others = [line for line in lines if not line.startswith("neuronal-ray")]
    if len(errors) != 1 or errors[0] != lines[-1]:
        return f"{len(errors)} error lines"
    if others:
        return f"{len(others)} other lines: {others[0]:.100}"
    if not errors[0].isprintable() or len(errors[0]) > _LONGEST_LINE:
        return "the line is unprintable or too long"
    if not any(word in errors[0] for word in case.named):
        return f"none of {', '.join(case.named)} is named"
    return ""


@contextmanager
def _surroundings(here: Path, temporary: Path) -> Iterator[None]:
    """Restore what a command may change in its process; temporary files go where they are seen."""
    directory, environment, threads = Path.cwd(), dict(os.environ), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    own = logging.getLogger("neuronal_ray")
    loggers, tempdir = list(own.handlers), tempfile.tempdir
    os.chdir(here)
    tempfile.tempdir = str(temporary)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        os.chdir(directory)
        tempfile.tempdir = tempdir
        own.handlers = loggers
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)


def _call(command: Callable[[], int]) -> _Ended:
    """Call a command with a time limit; keep what it and its libraries print, by file descriptor."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _HungError

    code: int | None
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        with _redirected(out, err):
            usual = signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                code = command()
            except _HungError:
                code = None
            except SystemExit as stopped:
                code = stopped.code if isinstance(stopped.code, int) else 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, usual)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return _Ended(code=code, out=texts[0], err=texts[1])


@contextmanager
def _redirected(out: IO[str], err: IO[str]) -> Iterator[None]:
    """Send both streams to files: Python's, those that libraries' loggers hold, and the descriptors below."""
    streams, kept = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    root, logging.root.handlers = logging.root.handlers, []  # pytest's
    for stream in streams:
        stream.flush()
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    sys.stdout, sys.stderr = out, err  # type: ignore[assignment]
    for handler in _stream_handlers():
        handler.stream = err
    try:
        yield
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = streams
        for number, descriptor in enumerate(kept, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        for handler in _stream_handlers():
            handler.stream = streams[1]
        logging.root.handlers = root


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    """Yield the handlers that print, of all loggers."""
    for name in list(logging.root.manager.loggerDict):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:
                yield handler


@contextmanager
def silenced() -> Iterator[None]:
    """Print nothing in the body."""
    with tempfile.TemporaryFile("w+") as out, _redirected(out, out):
        yield


def _snapshot(folder: Path) -> dict[str, str]:
    """What is in a folder, links not followed: kind, mode and content by path."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_mode & 0o400:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            content = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(folder))] = f"{oct(status.st_mode)} {content}"
    return found


def _make_removable(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
