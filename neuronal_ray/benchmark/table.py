"""Markdown tables of the JSON files of searches and jobs, from any number of runs and machines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from neuronal_ray.benchmark.record import Machine
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.read_files import checked, parse_json, read_text
from neuronal_ray.workers.footprint import GIB

_DESCRIPTION = """Print Markdown tables of files that `benchmark search` and `benchmark job` wrote with --output; of the
files of other measurements only the machine is printed."""
_SEARCH = (
    "model",
    "search tokens",
    "search",
    "forwards alone",
    "search / forwards",
    "arithmetic floor",
    "search / floor",
    "masks + statistics",
    "ranking",
    "token-forwards/s",
    "device peak",
    "formula",
    "host peak",
    "literal / search",
    "released / search",
)
_JOB = (
    "model",
    "whole job",
    "loading",
    "statistics",
    "ranking",
    "search",
    "perplexity, dense",
    "perplexity, pruned",
    "waiting for files",
    "device peak",
)
_ENDS = (" search", ": dense", ": pruned")
"""The ends of the stages' names that the middle columns sum up."""

_Seconds = Annotated[float, Field(ge=0, le=1e100)]
_Positive = Annotated[float, Field(gt=0, le=1e100)]


def main(argv: Sequence[str]) -> None:
    """Print the tables. Raises BadInput for a file that the benchmark did not write."""
    parser = Parser(prog="neuronal-ray benchmark table", description=_DESCRIPTION)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    documents = {file: _read(file) for file in parser.parse_args(argv).files}
    print("\n".join(tables(list(documents.values()))))


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What is read of every measurement."""

    kind: str


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A file of measurements."""

    machine: Machine
    measured: tuple[dict[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class _Stage:
    name: str
    seconds: _Seconds


@dataclass(frozen=True, kw_only=True)
class _Literal:
    ratio: _Seconds
    all_statistics: _Seconds


@dataclass(frozen=True, kw_only=True)
class _Model(_Entry):
    name: str
    blocks: int
    dtype: str
    device_bytes: int | None
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class _Search(_Model):
    stages: tuple[_Stage, ...]
    samples: int
    length: int
    search_s: _Positive
    forwards_alone_s: _Positive
    floor_s: _Positive
    staged_s: _Positive
    token_forwards: _Seconds
    formula_bytes: int | None
    host_bytes: int | None
    literal: _Literal | None


@dataclass(frozen=True, kw_only=True)
class _Job(_Model):
    stages: dict[str, _Seconds]
    total_s: _Seconds


def _read(file: Path) -> Mapping[str, Any]:
    """Return a file of measurements. Raises BadInput for one in which something that a table shows cannot be."""
    place = f"FILE: {file}"
    document = parse_json(read_text(file, flag="FILE"), place=place)
    if not isinstance(document, dict) or not {"machine", "measured"} <= set(document):
        raise BadInput(f"{place}: expected a file that the benchmark wrote with --output")
    for number, entry in enumerate(checked(document, _Document, place=place).measured):
        here = f"{place}: measured.{number}"
        kind = checked(entry, _Entry, place=here).kind
        if kind == "SearchMeasured":
            stages = {stage.name for stage in checked(entry, _Search, place=here).stages}
            _check_stages(stages, ("ranking",), place=here)
        elif kind == "JobMeasured":
            stages = set(checked(entry, _Job, place=here).stages)
            _check_stages(stages, ("loading", "statistics", "ranking", "checkpoint"), place=here)
    return document


def _check_stages(given: set[str], shown: Sequence[str], *, place: str) -> None:
    if missing := [name for name in shown if name not in given]:
        raise BadInput(f"{place}: stages lacks {', '.join(missing)}")


def tables(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the machines, a table of searches and one of jobs, as lines."""
    lines = list(dict.fromkeys(_machine(document["machine"]) for document in documents))
    measured = [entry for document in documents for entry in document["measured"]]
    for kind, header, row in (("SearchMeasured", _SEARCH, _search_row), ("JobMeasured", _JOB, _job_row)):
        rows = [row(entry) for entry in measured if entry["kind"] == kind]
        if rows:
            lines += ["", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
            lines += [f"| {' | '.join(cells)} |" for cells in rows]
    return lines


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    devices = ", ".join(machine["devices"]) or "no GPU"
    return (
        f"{machine['date']}, {devices}, {machine['cores']} cores ({machine['processor']}), "
        f"{machine['host_bytes'] / GIB:.0f} GiB; {versions}"
    )


def _model(entry: Mapping[str, Any]) -> str:
    offloaded = ", offloaded" if entry.get("offload") else ""
    return f"{entry['name']}, {entry['blocks']} blocks, {entry['dtype']}{offloaded}"


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB"


def _search_row(entry: Mapping[str, Any]) -> list[str]:
    stages = {stage["name"]: stage["seconds"] for stage in entry["stages"]}
    overhead_s = stages.get("masks", 0.0) + stages.get("statistics, candidates", 0.0)
    literal = entry["literal"]
    return [
        _model(entry),
        f"{entry['samples']} x {entry['length']}",
        f"{entry['search_s']:.1f} s",
        f"{entry['forwards_alone_s']:.1f} s",
        f"{entry['search_s'] / entry['forwards_alone_s']:.2f}",
        f"{entry['floor_s']:.1f} s",
        f"{entry['search_s'] / entry['floor_s']:.2f}",
        f"{overhead_s / entry['staged_s']:.1%}",
        f"{stages['ranking']:.2f} s",
        f"{entry['token_forwards'] / entry['search_s']:,.0f}",
        _gib(entry["device_bytes"]),
        _gib(entry["formula_bytes"]),
        _gib(entry["host_bytes"]),
        "-" if literal is None else f"{literal['ratio']:.2f}",
        "-" if literal is None else f"{literal['all_statistics']:.2f}",
    ]


def _job_row(entry: Mapping[str, Any]) -> list[str]:
    stages = entry["stages"]
    sums = (sum(spent for name, spent in stages.items() if name.endswith(end)) for end in _ENDS)
    return [
        _model(entry),
        f"{entry['total_s']:.1f} s",
        *(f"{stages[name]:.1f} s" for name in ("loading", "statistics", "ranking")),
        *(f"{spent:.1f} s" for spent in sums),
        f"{stages['checkpoint']:.1f} s",
        _gib(entry["device_bytes"]),
    ]
