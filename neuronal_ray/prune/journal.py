"""Finished candidates on disk, so that a run that was stopped does not compute them again.

A question is everything that scores depend on besides the plan: versions, model, search, device. Each has a folder:
`question.json`, `numbers.jsonl` with a line per result, and a safetensors file per trial, for its signals. A damaged
line or file is as if it were not there.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neuronal_ray.cli.atomic import staging_of, write_text
from neuronal_ray.cli.json_lines import append_line, read_lines
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group

logger = logging.getLogger(__name__)

_QUESTION = "question.json"


@dataclass(frozen=True)
class Number:
    """A result of one or more numbers: `kind` names the quantity, `key` is the digest of the candidate."""

    kind: str
    key: bytes
    values: tuple[float, ...]


class Journal:
    """The results of one question; nothing is written before the first of them."""

    def __init__(self, folder: Path, question: Mapping[str, str]) -> None:
        self._question = dict(question)
        self._folder = folder / hashlib.sha256(json.dumps(self._question, sort_keys=True).encode()).hexdigest()[:16]
        self._lines = self._folder / "numbers.jsonl"

    def numbers(self) -> Iterator[Number]:
        """Yield the numbers that were noted."""
        for entry in read_lines(self._lines):
            try:
                yield Number(entry["kind"], bytes.fromhex(entry["key"]), tuple(map(float, entry["values"])))
            except (ValueError, KeyError, TypeError):
                continue

    def note(self, number: Number) -> None:
        """Keep a number; it is on disk when this returns."""
        self._begin()
        append_line(self._lines, {"kind": number.kind, "key": number.key.hex(), "values": number.values})

    def trials(self) -> Iterator[tuple[bytes, Trial]]:
        """Yield the trials that were kept, by their plan's digest."""
        for path in sorted(self._folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as file:
                    known = json.loads(file.metadata()["trial"])
                    signals = {}
                    for name in file.keys():  # noqa: SIM118  (no mapping)
                        block, index = map(int, name.split("."))
                        signals[Group(block, index)] = file.get_tensor(name)
                yield (
                    bytes.fromhex(path.stem),
                    Trial(
                        misalignment=float(known["misalignment"]),
                        signals=dict(sorted(signals.items())),
                        divergences=tuple(map(float, known["divergences"])),
                    ),
                )
            except (SafetensorError, ValueError, KeyError, TypeError):
                continue

    def keep(self, digest: bytes, trial: Trial) -> None:
        """Keep a trial; it is on disk, whole, when this returns."""
        self._begin()
        path = self._folder / f"{digest.hex()}.safetensors"
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        known = {"misalignment": trial.misalignment, "divergences": trial.divergences}
        tensors = {
            f"{group.block}.{group.index}": signal.to(torch.float32).contiguous().clone()
            for group, signal in trial.signals.items()
        }
        save_file(tensors, temporary, metadata={"trial": json.dumps(known)})
        temporary.replace(path)

    def differences(self) -> tuple[str, ...]:
        """Return what differs from the most similar of the other questions in the folder; () if there is no other."""
        found = []
        for path in self._folder.parent.glob(f"*/{_QUESTION}"):
            if path.parent != self._folder:
                other = next(read_lines(path), {})
                found.append(tuple(name for name, value in self._question.items() if other.get(name) != value))
        return min(found, key=len, default=())

    def _begin(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / _QUESTION).is_file():
            write_text(self._folder / _QUESTION, json.dumps(self._question))


def journal_folder(output: Path) -> Path:
    """Return the folder of finished candidates next to the output directory."""
    return output.absolute().with_name(f".{output.name}.journal")


@contextmanager
def journaled(path: Path, *, resume: bool) -> Iterator[Path]:
    """Yield the folder of finished candidates next to the output directory `path`; remove it when the body succeeds.

    Without `resume` it starts empty; with it, what a killed run had staged is removed. After an error it stays, unless
    it is empty.
    """
    path = path.absolute()
    folder = journal_folder(path)
    if resume:
        for left in path.parent.glob(f".{path.name}.partial-*"):
            if left.name != staging_of(path).name:
                shutil.rmtree(left, ignore_errors=True)
    elif folder.exists():
        logger.warning("the finished candidates of an earlier run of %s are dropped; --resume would keep them", path)
        shutil.rmtree(folder)
    try:
        yield folder
    except BaseException:
        if not any(file.is_file() for file in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
