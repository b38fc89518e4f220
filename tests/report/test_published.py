"""The paper's numbers are complete and without slips, as far as the redundancy within the paper can tell."""

import math
import tomllib
from typing import Any

import pytest

from neuronal_ray.evaluate.benchmark_names import ZERO_SHOT
from neuronal_ray.report.published_tables import PUBLISHED, published_tables

TABLES: list[dict[str, Any]] = tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["table"]
MISPRINTS = {
    ("mistral-7b", "wanda", "neuronal", 0.6),  # 557.04 for 57.04
    ("llama-7b", "multiflow", "uniform", 0.6),
}


def test_every_table_with_numbers_is_there() -> None:
    assert {table["number"] for table in TABLES} == set(range(2, 25))
    assert sum(len(line) - len(table["rows"]) for table in TABLES for line in table["values"]) == 3309


@pytest.mark.parametrize("table", TABLES, ids=lambda table: f"{table['number']}-{table.get('sparsity')}")
def test_every_line_has_its_words_and_numbers(table: dict[str, Any]) -> None:
    words = len(table["rows"])
    for line in table["values"]:
        assert len(line) == words + len(table["columns"])
        assert all(isinstance(word, str) for word in line[:words])
        assert all(isinstance(value, int | float) for value in line[words:])
    assert len({tuple(line[:words]) for line in table["values"]}) == len(table["values"])


def by_task() -> dict[tuple[str, str, str, float], list[float]]:
    tables = [table for table in TABLES if table["number"] in range(11, 17)]
    return {(*line[:3], table["sparsity"]): line[3:] for table in tables for line in table["values"]}


def test_averages_are_those_of_the_seven_tasks() -> None:
    assert [task for _, task in TABLES[[t["number"] for t in TABLES].index(11)]["columns"]] == [*ZERO_SHOT, "mean"]
    for key, values in by_task().items():
        if key not in MISPRINTS:
            assert math.isclose(sum(values[:7]) / 7, values[7], abs_tol=0.06), (key, sum(values[:7]) / 7, values[7])


def test_the_main_tables_have_the_appendix_averages() -> None:
    tasks = by_task()
    for table in TABLES:
        if table["number"] not in (4, 5):
            continue
        for method, allocation, *means in table["values"]:
            for (model, _), mean in zip(table["columns"], means, strict=True):
                assert mean == pytest.approx(tasks[model, method, allocation, table["sparsity"]][7], abs=0.011)


def test_the_paper_marks_its_best() -> None:
    (table,) = published_tables([3], [0.7])
    column = table.columns.index("llama-7b wikitext2")
    marks = {row: marks[column] for row, marks in zip(table.rows, table.marks, strict=True)}
    assert {row[1] for row, mark in marks.items() if mark is not None and mark.rank == 1} == {"neuronal"}
    second = marks["wanda", "owl"]
    assert second is not None
    assert (second.text, second.rank) == ("24.6", 2)
