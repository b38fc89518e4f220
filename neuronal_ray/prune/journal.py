"""Finished candidates on disk, so that a run that was stopped does not compute them again.

A question is everything that scores depend on besides the plan: versions, model, search, device. Each has a folder:
`question.json`, `numbers.jsonl` with a line per result (cli/json_lines.py says what becomes of damage), and a
safetensors file per trial, for its signals; a trial whose file is damaged is run again.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, cast

import torch
from pydantic import StringConstraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from neuronal_ray.cli.atomic import staging_of, write_text
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.json_lines import JsonLines
from neuronal_ray.cli.read_files import checked, parse_json, read_json
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group

logger = logging.getLogger(__name__)

_QUESTION = "question.json"


_NUMBERS = "numbers.jsonl"
_FLAG = "--resume"

Spelled = float | Literal["inf", "-inf", "nan"]
"""A float as the journal has it: JSON has no number for infinity and NaN."""


@dataclass(frozen=True)
class Number:
    """A result of one or more numbers: `kind` names the quantity, `key` is the digest of the candidate."""

    kind: str
    key: bytes
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class _NumberEntry:
    """A line of numbers.jsonl."""

    kind: Literal["kl", "loss", "change", "window start"]
    key: Annotated[str, StringConstraints(pattern="^([0-9a-f]{2})+$")]
    values: tuple[Spelled, ...]

    def __post_init__(self) -> None:
        """Raise ValueError when there are too few or too many values."""
        if not self.values or (self.kind in ("loss", "change") and len(self.values) > 1):
            raise ValueError(f"{len(self.values)} values of {self.kind}")


@dataclass(frozen=True, kw_only=True)
class _TrialEntry:
    """What a trial's file has besides its signals."""

    misalignment: Spelled
    divergences: tuple[Spelled, ...]


def _spelled(values: Iterable[float]) -> list[Spelled]:
    return [value if math.isfinite(value) else cast(Spelled, str(value)) for value in values]


class Journal:
    """The results of one question; nothing is written before the first of them."""

    def __init__(self, folder: Path, question: Mapping[str, str]) -> None:
        self._question = dict(question)
        self._folder = folder / hashlib.sha256(json.dumps(self._question, sort_keys=True).encode()).hexdigest()[:16]
        self._lines = JsonLines(self._folder / _NUMBERS, flag=_FLAG)

    def numbers(self) -> list[Number]:
        """Return the numbers that were noted. Raises BadInput for a journal that cannot be read."""
        entries = [checked(line.value, _NumberEntry, place=line.place) for line in self._lines.read()]
        return [Number(entry.kind, bytes.fromhex(entry.key), tuple(map(float, entry.values))) for entry in entries]

    def note(self, number: Number) -> None:
        """Keep a number; it is on disk when this returns."""
        self._begin()
        self._lines.append({"kind": number.kind, "key": number.key.hex(), "values": _spelled(number.values)})

    def trials(self) -> Iterator[tuple[bytes, Trial]]:
        """Yield the trials that were kept, by their plan's digest."""
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    text = parse_json((file.metadata() or {}).get("trial", ""), place=str(path))
                    known = checked(text, _TrialEntry, place=str(path))
                    signals = {}
                    for name in file.keys():  # noqa: SIM118  (no mapping)
                        block, index = map(int, name.split("."))
                        signals[Group(block, index)] = file.get_tensor(name)
                yield (
                    bytes.fromhex(path.stem),
                    Trial(
                        misalignment=float(known.misalignment),
                        signals=dict(sorted(signals.items())),
                        divergences=tuple(map(float, known.divergences)),
                    ),
                )
            except (SafetensorError, ValueError, OSError) as error:
                logger.warning("%s: %s is dropped, it cannot be read (%s)", _FLAG, path, " ".join(str(error).split()))

    def keep(self, digest: bytes, trial: Trial) -> None:
        """Keep a trial; it is on disk, whole, when this returns."""
        self._begin()
        path = self._folder / f"{digest.hex()}.safetensors"
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        (misalignment,), divergences = _spelled([trial.misalignment]), _spelled(trial.divergences)
        known = {"misalignment": misalignment, "divergences": divergences}
        tensors = {
            f"{group.block}.{group.index}": signal.to(torch.float32).contiguous().clone()
            for group, signal in trial.signals.items()
        }
        try:
            temporary.write_bytes(save(tensors, metadata={"trial": json.dumps(known)}))  # OSError when the disk is full
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def differences(self) -> tuple[str, ...]:
        """Return what differs from the most similar of the other questions in the folder; () if there is no other."""
        found = []
        for path in self._folder.parent.glob(f"*/{_QUESTION}"):
            if path.parent != self._folder:
                other = read_json(path, dict[str, str], flag=_FLAG)
                found.append(tuple(name for name, value in self._question.items() if other.get(name) != value))
        return min(found, key=len, default=())

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / _QUESTION).is_file():
            write_text(self._folder / _QUESTION, json.dumps(self._question))


def journal_folder(output: Path) -> Path:
    """Return the folder of finished candidates next to the output directory."""
    return output.absolute().with_name(f".{output.name}.journal")


def check_journal(folder: Path, *, version: str) -> None:
    """Raise BadInput, and change nothing, when --resume cannot read what this version of the code has kept."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise BadInput(f"{_FLAG}: {folder} is no directory, expected the finished candidates of an earlier run")
    for path in sorted(folder.glob(f"*/{_QUESTION}")):
        question = read_json(path, dict[str, str], flag=_FLAG)
        if question.get("neuronal_ray") == version:
            for line in JsonLines(path.with_name(_NUMBERS), flag=_FLAG).read():
                checked(line.value, _NumberEntry, place=line.place)


@contextmanager
def journaled(path: Path, *, resume: bool, version: str) -> Iterator[Path]:
    """Yield the folder of finished candidates next to the output directory `path`; remove it when the body succeeds.

    Without `resume` it starts empty; with it, what a killed run had staged is removed, and BadInput is raised before
    anything changes when the journal cannot be read. After an error it stays, unless it is empty.
    """
    path = path.absolute()
    folder = journal_folder(path)
    if resume:
        check_journal(folder, version=version)
        for left in path.parent.glob(f".{path.name}.partial-*"):
            if left.name != staging_of(path).name:
                shutil.rmtree(left, ignore_errors=True)
    elif os.path.lexists(folder):
        if folder.is_symlink() or not folder.is_dir():
            raise BadInput(f"--output: {folder} is no directory, and in the way of finished candidates; remove it")
        logger.warning("the finished candidates of an earlier run of %s are dropped; --resume would keep them", path)
        shutil.rmtree(folder)
    try:
        yield folder
    except BaseException:
        if not any(file.is_file() for file in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
