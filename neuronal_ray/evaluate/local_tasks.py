"""Tasks of lm-eval on local rows (`--task-data DIR`), and the check that lm-eval can use each of these rows."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import datasets
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.documents import one_line
from neuronal_ray.evaluate.local_rows import find_files, read_rows
from neuronal_ray.evaluate.scores import BenchmarkSettings

_FLAG = "--task-data"
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")


@cache
def task_manager() -> TaskManager:
    """Return the index of lm-eval's tasks; reading it takes seconds."""
    return TaskManager()


def local_task(name: str, settings: BenchmarkSettings) -> dict[str, Any]:
    """Return lm-eval's configuration of the task, with local rows in place of the hub's."""
    files, _ = _used_files(name, settings)
    return _configuration(name, {split: read_rows(path, name) for split, path in files.items()})


def check_rows(name: str, settings: BenchmarkSettings) -> None:
    """Put every row that the evaluation may use through the task of lm-eval, as it will. Raises BadInput for the first.

    lm-eval itself would fail in the middle of the evaluation, count a label without a choice as a wrong answer, and
    write "None" for what a row lacks.
    """
    files, wanted = _used_files(name, settings)
    splits = {split: read_rows(path, name) for split, path in files.items()}
    process = _read_configuration(name, resolve=True).get("process_docs")
    for split, path in files.items():

        def use(rows: datasets.Dataset) -> None:
            _use(name, splits | {wanted: rows})

        rows = splits[split]
        if (error := _failure(rows, use, process)) is None:
            continue
        first, count = 0, len(rows)
        while count > 1:  # the first half fails, or the second does
            half = count // 2
            found = _failure(rows.select(range(first, first + half)), use, process)
            if found is None:
                first, count = first + half, count - half
            else:
                count, error = half, found
        error = _failure(rows.select([first]), use, process) or error
        raise BadInput(
            f"{_FLAG}: row {first + 1} of {path} is no row of {name} ({type(error).__name__}: {one_line(error):.200})"
        ) from error


def _failure(
    rows: datasets.Dataset, use: Callable[[datasets.Dataset], None], process: Callable[..., Any] | None
) -> Exception | None:
    """Return the error that the use of `rows` ends in; rows that the task leaves out are not used."""
    try:
        if process is None or len(process(rows)):
            use(rows)
    except Exception as error:  # whatever the task's own code raises on rows that it was not written for
        return error
    return None


def _use(name: str, splits: dict[str, datasets.Dataset]) -> None:
    """Build the task on `splits` and format each document. Raises an error of any type when one is of no use."""
    (task,) = task_manager().load([_configuration(name, splits)])["tasks"].values()
    for document in task.eval_docs:
        known = {key: value for key, value in document.items() if value is not None}  # absent in the file, or null
        text, target = task.doc_to_text(known), task.doc_to_target(known)
        if task.config.output_type == "multiple_choice":
            answer = text if task.multiple_input else target
            _check_choices(task.doc_to_choice(known), answer if isinstance(answer, list) else [answer])


def _check_choices(choices: object, answers: list[object]) -> None:
    """Raise ValueError unless there are choices, all of them text, and each answer is one of them or its index."""
    if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices) or not any(choices):
        raise ValueError(f"the choices are {choices!r:.80}, expected texts")
    for answer in answers:
        known = answer in choices if isinstance(answer, str) else isinstance(answer, int) and -1 < answer < len(choices)
        if not known:
            raise ValueError(f"the answer {answer!r:.80} is none of {len(choices)} choices")


def _used_files(name: str, settings: BenchmarkSettings) -> tuple[dict[str, Path], str]:
    """Return the file of each split that is used, and the split that is evaluated. Raises BadInput when one lacks."""
    assert settings.data is not None
    manager = task_manager()
    if not settings.data.is_dir():
        raise BadInput(f"{_FLAG}: no directory {settings.data}")
    if name in (*manager.all_groups, *manager.all_tags):
        raise BadInput(f"{_FLAG}: {name} is a group of tasks; name its members")
    config = _read_configuration(name)
    wanted: str | None = config.get("test_split") or config.get("validation_split")
    if wanted is None:
        raise BadInput(f"{_FLAG}: {name} has its rows in code of lm-eval, and takes no local ones")
    files = find_files(settings.data, name, default=wanted)
    if wanted not in files:
        raise BadInput(f"{_FLAG}: {name} is evaluated on its {wanted} rows, {settings.data} has {', '.join(files)}")
    used = {wanted}
    if _shots(config, settings):
        shots = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split") or wanted
        if shots not in files:
            raise BadInput(
                f"--few-shot: needs the {shots} rows of {name} in {settings.data}, for example {name}_{shots}.jsonl"
            )
        used.add(shots)
    return {split: path for split, path in files.items() if split in used}, wanted


def _shots(config: Mapping[str, Any], settings: BenchmarkSettings) -> int:
    """Return the number of examples before each question that come from rows."""
    if (config.get("fewshot_config") or {}).get("samples"):
        return 0  # written in the configuration
    return int(config.get("num_fewshot") or 0) if settings.few_shot is None else settings.few_shot


def _read_configuration(name: str, *, resolve: bool = False) -> dict[str, Any]:
    config: dict[str, Any] = load_yaml(task_manager().task_index[name].yaml_path, resolve_func=resolve)
    return config


def _configuration(name: str, splits: dict[str, datasets.Dataset]) -> dict[str, Any]:
    config = _read_configuration(name)
    absent = [key for key in _SPLITS if config.get(key) not in splits]
    rows = datasets.DatasetDict(splits)
    member = {"task": name, "custom_dataset": lambda **_: rows} | dict.fromkeys(absent)
    return {"group": f"local {name}", "task": [member]}  # lm-eval lets a group's member differ from its configuration
