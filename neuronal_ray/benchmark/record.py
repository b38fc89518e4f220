"""Measurements as JSON files, with the machine that they were made on."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from neuronal_ray.benchmark.output import FORMAT
from neuronal_ray.cli.atomic import write_json
from neuronal_ray.cli.memory import machine_bytes


class Measured(Protocol):
    """A frozen dataclass of figures that can be printed."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
        ...


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the versions that figures depend on."""

    date: str
    processor: str
    cores: int
    threads: int
    host_bytes: int
    devices: tuple[str, ...]
    versions: dict[str, str]

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        devices = ", ".join(self.devices) or "no GPU"
        return (
            f"{self.date}: {self.processor}, {self.cores} cores, {self.threads} threads, "
            f"{self.host_bytes / 2**30:.0f} GiB, {devices}; {versions}"
        )


def machine() -> Machine:
    """Return this machine, today."""
    return Machine(
        date=date.today().isoformat(),
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        host_bytes=machine_bytes(),
        devices=tuple(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("torch", "transformers")},
    )


def _processor() -> str:
    """Return the processor's name as Linux has it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _named(figures: Measured) -> dict[str, object]:
    return {"kind": type(figures).__name__} | asdict(figures)


def publish(measured: Sequence[Measured], output: Path | None) -> None:
    """Write the figures as JSON, if there is an output file."""
    if output is None:
        return
    document = {"format": FORMAT, "machine": asdict(machine()), "measured": [_named(figures) for figures in measured]}
    write_json(output, document)
