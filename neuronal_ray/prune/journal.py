"""Finished candidates on disk: what a run that was stopped need not ask again.

One folder per question that answers depend on (model, text, pruner, device, ..): `numbers.jsonl`, a line per answer,
and one safetensors file per trial, for its signals. A line or file that was cut short is as if it were not there.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neuronal_ray.cli.atomic import staging_of
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group

logger = logging.getLogger(__name__)

_SIGNAL = "{}.{}"


@dataclass(frozen=True)
class Number:
    """One answer that is a number or some: `kind` says of which question, `key` of which candidate."""

    kind: str
    key: bytes
    values: tuple[float, ...]


class Journal:
    """See the module's docstring; `question` names what the answers depend on."""

    def __init__(self, folder: Path, question: str) -> None:
        self._folder = folder / hashlib.sha256(question.encode()).hexdigest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lines = self._folder / "numbers.jsonl"

    def numbers(self) -> Iterator[Number]:
        """What was noted."""
        if not self._lines.is_file():
            return
        for line in self._lines.read_text().splitlines():
            try:
                known = json.loads(line)
                yield Number(known["kind"], bytes.fromhex(known["key"]), tuple(map(float, known["values"])))
            except (ValueError, KeyError, TypeError):
                continue

    def note(self, number: Number) -> None:
        """Keep an answer; it is on disk when this returns."""
        line = json.dumps({"kind": number.kind, "key": number.key.hex(), "values": number.values})
        with self._lines.open("a") as file:
            file.write("\n" + line)  # the line before may have been cut short
            file.flush()
            os.fsync(file.fileno())

    def trials(self) -> Iterator[tuple[bytes, Trial]]:
        """The trials that were kept, by their plan's digest."""
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
        path = self._folder / f"{digest.hex()}.safetensors"
        temporary = path.with_suffix(f".partial-{os.getpid()}")
        known = {"misalignment": trial.misalignment, "divergences": trial.divergences}
        tensors = {
            _SIGNAL.format(group.block, group.index): signal.to(torch.float32).contiguous().clone()
            for group, signal in trial.signals.items()
        }
        save_file(tensors, temporary, metadata={"trial": json.dumps(known)})
        temporary.replace(path)


@contextmanager
def journaled(path: Path, *, resume: bool) -> Iterator[Path]:
    """The folder of finished candidates beside the output directory `path`; it goes when the body succeeds.

    Without `resume` it starts empty; with it, what a killed run had staged is removed. After an error it stays, unless
    it is empty.
    """
    path = path.absolute()
    folder = path.with_name(f".{path.name}.journal")
    if resume:
        for left in path.parent.glob(f".{path.name}.partial-*"):
            if left.name != staging_of(path).name:
                shutil.rmtree(left, ignore_errors=True)
    elif folder.exists():
        logger.warning("an earlier run of %s was not finished; --resume would go on where it was", path)
        shutil.rmtree(folder)
    try:
        yield folder
    except BaseException:
        if not any(file.is_file() for file in folder.rglob("*")):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
