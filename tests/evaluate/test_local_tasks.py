"""Is each local row put through lm-eval's task before any work, and the first that is of no use named?"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.evaluate.local_tasks import check_rows, local_task
from neuronal_ray.evaluate.scores import BenchmarkSettings

Row = dict[str, Any]
ROWS = 7

GOOD: dict[str, Callable[[int], Row]] = {
    "rte": lambda n: {"sentence1": f"the cat {n}", "sentence2": "it sat", "label": n % 2, "idx": n},
    "winogrande": lambda n: {"sentence": f"{n} saw _ run", "option1": "it", "option2": "cats", "answer": "12"[n % 2]},
    "hellaswag": lambda n: {
        "activity_label": "Run",
        "ctx_a": f"a dog {n}",
        "ctx_b": "it",
        "endings": ["ran", "sat", "flew", "saw"],
        "label": str(n % 4),
    },
    "arc_easy": lambda n: {
        "question": f"who ran {n}",
        "choices": {"text": ["dog", "cat", "owl"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[n % 3],
    },
    "gsm8k": lambda n: {"question": f"how many is {n}?", "answer": f"It is #### {n}"},
}


def write(folder: Path, name: str, rows: list[Row]) -> Path:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def split_of(task: str) -> str:
    return "test" if task in ("arc_easy", "gsm8k") else "validation"


@pytest.mark.parametrize("task", GOOD)
def test_good_rows_are_taken(task: str, tmp_path: Path) -> None:
    write(tmp_path, f"{task}_{split_of(task)}.jsonl", [GOOD[task](n) for n in range(ROWS)])
    check_rows(task, BenchmarkSettings(data=tmp_path, few_shot=0))


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("rte", {"sentence1": None}),
        ("rte", {"label": None}),
        ("rte", {"label": 2}),
        ("rte", {"label": -1}),
        ("winogrande", {"sentence": "no gap"}),
        ("winogrande", {"answer": "3"}),
        ("winogrande", {"option1": None}),
        ("hellaswag", {"ctx_b": None}),
        ("hellaswag", {"label": "4"}),
        ("hellaswag", {"label": ""}),
        ("hellaswag", {"endings": []}),
        ("arc_easy", {"answerKey": "D"}),
        ("arc_easy", {"choices": {"text": [], "label": []}}),
        ("gsm8k", {"answer": None}),
    ],
    ids=str,
)
def test_the_first_row_of_no_use_is_named(task: str, change: Row, tmp_path: Path) -> None:
    rows = [GOOD[task](n) | (change if n in (4, 6) else {}) for n in range(ROWS)]
    path = write(tmp_path, f"{task}_{split_of(task)}.jsonl", rows)
    with pytest.raises(BadInput, match="--task-data") as refused:
        check_rows(task, BenchmarkSettings(data=tmp_path, few_shot=0))
    said = str(refused.value)
    assert f"row 5 of {path} is no row of {task}" in said, said
    assert len(said.splitlines()) == 1, said


def test_rows_of_the_examples_are_checked_where_there_are_examples(tmp_path: Path) -> None:
    write(tmp_path, "rte_validation.jsonl", [GOOD["rte"](n) for n in range(ROWS)])
    path = write(tmp_path, "rte_train.jsonl", [GOOD["rte"](0), GOOD["rte"](1) | {"label": 7}])
    check_rows("rte", BenchmarkSettings(data=tmp_path))
    with pytest.raises(BadInput, match=f"row 2 of {path}"):
        check_rows("rte", BenchmarkSettings(data=tmp_path, few_shot=1))


def test_examples_that_the_task_asks_for_come_from_its_own_rows(tmp_path: Path) -> None:
    """lm-eval itself would take questions and their answers as examples before them."""
    write(tmp_path, "gsm8k_test.jsonl", [GOOD["gsm8k"](n) for n in range(ROWS)])
    with pytest.raises(BadInput, match=r"--few-shot: needs the train rows of gsm8k .* gsm8k_train\.jsonl"):
        check_rows("gsm8k", BenchmarkSettings(data=tmp_path))


def test_splits_that_are_not_used_may_lack_labels(tmp_path: Path) -> None:
    write(tmp_path, "hellaswag_validation.jsonl", [GOOD["hellaswag"](n) for n in range(ROWS)])
    write(tmp_path, "hellaswag_test.jsonl", [{"ctx_a": "no label"}])
    check_rows("hellaswag", BenchmarkSettings(data=tmp_path))
    (member,) = local_task("hellaswag", BenchmarkSettings(data=tmp_path))["task"]
    assert list(member["custom_dataset"]()) == ["validation"]
