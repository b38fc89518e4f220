"""Rows of benchmarks from local files (`--task-data DIR`) instead of the hub.

Files are found by name (`rte_val.jsonl`, `arc_easy/test.parquet`); their rows are converted to the hub's field names,
which lm-eval's task configurations read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import parse_json, read_text

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".parquet")
_SPLITS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
}
_SPLITS |= {"test": "test"}
_FLAG = "--task-data"


def _rte(row: Row) -> Row:
    """Convert SuperGLUE's form: premise, hypothesis and the label in words."""
    if "sentence1" in row:
        return row
    label = row["label"]
    named = {"entailment": 0, "not_entailment": 1}
    return {
        "sentence1": row["premise"],
        "sentence2": row["hypothesis"],
        "label": named[label] if isinstance(label, str) else label,
        "idx": row.get("idx", 0),
    }


def _boolq(row: Row) -> Row:
    """Convert BoolQ's own form: the answer as a Boolean."""
    return row if "label" in row else {**row, "label": int(row["answer"])}


def _hellaswag(row: Row) -> Row:
    """Convert HellaSwag's own form: the label as a number."""
    return {**row, "label": str(row["label"])}


def _arc(row: Row) -> Row:
    """Convert AI2's own form: stem and choices inside the question."""
    if "choices" in row:
        return row
    question = row["question"]
    choices = {name: [choice[name] for choice in question["choices"]] for name in ("text", "label")}
    return {"id": row.get("id", ""), "question": question["stem"], "choices": choices, "answerKey": row["answerKey"]}


def _openbookqa(row: Row) -> Row:
    """Convert a query, a list of choices and the index of the right one."""
    if "question_stem" in row:
        return row
    labels = [chr(ord("A") + number) for number in range(len(row["choices"]))]
    return {
        "id": str(row.get("id", "")),
        "question_stem": row["query"],
        "choices": {"text": row["choices"], "label": labels},
        "answerKey": labels[row["gold"]],
    }


_SHAPES: dict[str, Callable[[Row], Row]] = {
    "rte": _rte,
    "boolq": _boolq,
    "hellaswag": _hellaswag,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
}
"""Tasks whose rows are published in other forms than the hub's; rows of other tasks are not converted."""


def find_files(directory: Path, task: str, *, default: str) -> dict[str, Path]:
    """Return the file of each split of `task`; a name without a split means `default`. BadInput if there is no file."""
    found: dict[str, Path] = {}
    for path in sorted([*directory.glob(f"{task}*"), *directory.glob(f"{task}/*")]):
        if path.suffix not in _SUFFIXES or not path.is_file():
            continue
        rest = path.stem.removeprefix(task).strip("_-.") if path.parent == directory else path.stem
        word = rest.rstrip("0123456789")
        if word and word not in _SPLITS:
            continue  # another task, whose name begins alike
        split = _SPLITS.get(word, default)
        if split in found:
            raise BadInput(f"{_FLAG}: {found[split].name} and {path.name} are both the {split} rows of {task}")
        found[split] = path
    if not found:
        expected = f"for example {task}_{default}.jsonl or {task}/{default}.parquet"
        raise BadInput(f"{_FLAG}: no rows of {task} in {directory}, expected {expected}")
    return found


def read_rows(path: Path, task: str) -> datasets.Dataset:
    """Return the rows of a file in the form that the task's configuration reads. Raises BadInput naming the row."""
    if path.suffix == ".parquet":
        try:
            rows = datasets.Dataset.from_parquet(str(path), keep_in_memory=True).to_list()
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise BadInput(f"{_FLAG}: {path} is not a Parquet file ({' '.join(str(error).split())})") from error
    else:
        lines = read_text(path, flag=_FLAG).split("\n")
        rows = [_json_row(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise BadInput(f"{_FLAG}: {path} is empty, expected one row per line")
    shape = _SHAPES.get(task)
    if shape is None:
        return _dataset(rows, path)
    shaped = []
    for number, row in enumerate(rows, start=1):
        try:
            shaped.append(dict(shape(row)))
        except (KeyError, TypeError, IndexError) as error:
            raise BadInput(
                f"{_FLAG}: row {number} of {path} is no row of {task} (field {error}); it has {', '.join(row)}"
            ) from error
    return _dataset(shaped, path)


def _dataset(rows: list[dict[str, Any]], path: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_list(rows)
    except pyarrow.ArrowException as error:
        raise BadInput(f"{_FLAG}: the rows of {path} differ in the types of their fields ({error})") from error


def _json_row(line: str, path: Path, number: int) -> dict[str, Any]:
    place = f"{_FLAG}: line {number} of {path}"
    row = parse_json(line, place=place)
    if not isinstance(row, dict):
        raise BadInput(f"{place} is a JSON {type(row).__name__}, expected an object")
    return row
