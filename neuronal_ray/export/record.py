"""pruning.json of a model that is checked or exported: what it says, and what was counted in what was written."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import checked, read_json
from neuronal_ray.models.formats.audit import LinearZeros
from neuronal_ray.models.hub import commit_of

RECORD = "pruning.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Zeros among the prunable weights, and all of those."""

    pruned: int
    prunable: int

    def __str__(self) -> str:
        return f"{self.pruned:,} of {self.prunable:,}"


@dataclass(frozen=True, kw_only=True)
class _Stated:
    """What is used of a record."""

    sparsity: Counts


def counts_of(linears: Sequence[LinearZeros]) -> Counts:
    """Return the sums over all linears."""
    return Counts(pruned=sum(linear.zeros for linear in linears), prunable=sum(linear.size for linear in linears))


def check_record(path: Path, counted: Counts) -> None:
    """Raise BadInput when the model in `path` has a record with other numbers of weights or zeros."""
    if (stated := stated_counts(path)) not in (None, counted):
        raise BadInput(
            f"--model: {path / RECORD} says that {stated} weights are zero, the tensors have {counted.pruned:,} of "
            f"{counted.prunable:,}"
        )


def new_record(source: Path, counted: Counts, *, model: str, form: str, changed: bool = False) -> dict[str, object]:
    """Return the record of what was written in the form `form` from the model in `source`.

    It has all that the record of `source` says if that is still true: it has the same counts, and the weights have not
    been `changed` since. Otherwise it says what was counted alone, and a warning says so.
    """
    found = {"zeros": counted.pruned, "weights": counted.prunable}
    export = {"export": {"format": form, **found}}
    stated = stated_counts(source)
    if stated == counted and not changed:
        return read_json(source / RECORD, dict[str, Any], flag="--model") | export
    if stated not in (None, counted) and not changed:
        logger.warning(
            "--model: %s says that %s weights are zero, the tensors have %s; the export records these alone",
            source / RECORD,
            stated,
            counted,
        )
    sparsity = {
        "achieved": counted.pruned / counted.prunable,
        "pruned": counted.pruned,
        "prunable": counted.prunable,
    }
    return {"format": 1, "model": model, "revision": commit_of(source), "sparsity": sparsity, **export}


def stated_counts(path: Path) -> Counts | None:
    """Return what a model's record says; None without one. Raises BadInput for a damaged one."""
    file = path / RECORD
    if not file.is_file():
        return None
    document = read_json(file, dict[str, Any], flag="--model")
    return checked(document, _Stated, place=f"--model: {file}").sparsity
