"""Variants are compared case by case: damages averaged geometrically, overflows lost, and ratios only where defined."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from results import row

from neuronal_ray.report.comparisons import Case, cases_of, compare, comparison_tables
from neuronal_ray.report.schemas import DENSE, Result


def result(
    variant: str,
    value: float | None,
    *,
    seed: int = 0,
    sparsity: float = 0.7,
    dense: float = 2.0,
    search_seconds: float = 1.0,
    evaluation: str = "text",
) -> Result:
    return row(
        cell=f"{variant} {seed} {sparsity}",
        variant=variant,
        value=value,
        seed=seed,
        sparsity=sparsity,
        dense=dense,
        search_seconds=search_seconds,
        evaluation=evaluation,
        problem=None if value is not None else "overflow",
    )


def cases(*results: Result) -> list[Case]:
    return cases_of(results, {one.cell: (one.seed, one.sparsity) for one in results})


def cells(found: Sequence[Case], *references: Sequence[str], at: Sequence[str], table: int = 0) -> list[str]:
    """The texts of the line that begins with `at`."""
    tables = comparison_tables(found, references)
    (marks,) = [
        marks for words, marks in zip(tables[table].rows, tables[table].marks, strict=True) if words == tuple(at)
    ]
    return ["-" if mark is None else mark.text for mark in marks]


def test_damage_is_averaged_geometrically_and_the_worst_case_is_found() -> None:
    # damages ln(16/2) = 3 ln 2 and ln(8/2) = 2 ln 2 against 2 ln 2 and 4 ln 2 of the reference
    known = cases(
        result("authors", 8.0),
        result("best", 16.0),
        result("authors", 32.0, seed=1),
        result("best", 8.0, seed=1),
        result("best", 3.0, seed=2),  # nothing to compare with
    )
    found = compare(known, "best", "authors")
    assert found.cases == found.compared == 2
    assert found.damage == pytest.approx(((3 / 2) * (2 / 4)) ** 0.5)
    assert found.worst == pytest.approx(1.5)
    assert found.perplexity == pytest.approx(((16 / 8) * (8 / 32)) ** 0.5)
    assert found.wins == 1
    assert cells(known, ["authors"], at=("70 %", "best"))[:5] == ["0.866", "1 of 2", "1.500", "2", "0.707"]


def test_overflow_is_a_loss_and_shown_as_inf() -> None:
    known = cases(
        result("authors", 8.0), result("best", None), result("authors", None, seed=1), result("best", None, seed=1)
    )
    found = compare(known, "best", "authors")
    assert (found.damage, found.worst, found.wins, found.cases, found.compared) == (math.inf, math.inf, 0, 2, 1)
    assert cells(known, ["authors"], at=("70 %", "best"))[:4] == ["inf", "0 of 2", "inf", "1 of 2"]


def test_an_overflow_of_the_reference_is_a_win_without_a_ratio() -> None:
    found = compare(cases(result("authors", None), result("best", 9.0)), "best", "authors")
    assert (found.wins, found.cases, found.compared) == (1, 1, 0)
    assert math.isnan(found.damage)
    assert math.isnan(found.worst)


def test_a_damage_that_is_not_positive_has_no_ratio() -> None:
    found = compare(cases(result("authors", 8.0), result("best", 1.5)), "best", "authors")
    assert (found.wins, found.compared) == (1, 0)
    assert found.perplexity == pytest.approx(1.5 / 8)


def test_a_reference_of_several_variants_is_the_best_of_them_in_each_case() -> None:
    names = ["authors", "solver uniform", "solver owl", "solver best"]
    results = [result(name, value) for name, value in zip(names, (9.0, 8.0, 4.0, 6.0), strict=True)]
    results += [result(name, value, seed=1) for name, value in zip(names, (9.0, 8.0, 32.0, 4.0), strict=True)]
    # against 4 (owl) and 8 (uniform): ln 3 / ln 2 and ln 2 / ln 4
    expected = math.sqrt(math.log(3) / math.log(2) * 0.5)
    references = ["solver uniform", "solver owl"]
    found = cells(cases(*results), references, at=("70 %", "solver best"))
    assert found[:3] == [f"{expected:.3f}", "1 of 2", "1.585"]
    assert cells(cases(*results), references, at=("70 %", "solver owl"))[1] == "0 of 2"
    (table,) = comparison_tables(cases(*results), [references])
    assert {variant for _, variant in table.rows} == set(names)


def test_a_variant_is_compared_in_the_cells_that_it_has() -> None:
    known = cases(result("authors", 8.0), result("best", 8.0), result("best", 32.0, seed=1), result("no rows", 32.0))
    assert cells(known, ["best"], at=("70 %", "no rows"))[:4] == ["2.000", "0 of 1", "2.000", "1"]


def test_seconds_are_relative_to_the_reference_in_the_same_cells() -> None:
    known = cases(
        result("paper", 8.0, search_seconds=2.0),
        result("best", 8.0, search_seconds=1.0),
        result("best", 8.0, seed=1, search_seconds=3.0),  # no reference
    )
    assert cells(known, ["paper"], at=("70 %", "best"))[5] == "0.500"


def test_sparsities_are_pooled_in_a_group_of_their_own() -> None:
    known = cases(
        result("authors", 8.0),
        result("best", 4.0),
        result("authors", 8.0, sparsity=0.8),
        result("best", 32.0, sparsity=0.8),
    )
    found = [cells(known, ["authors"], at=(label, "best"))[0] for label in ("70 %", "80 %", "all")]
    assert found == ["0.500", "2.000", "1.000"]


def test_texts_have_tables_of_their_own() -> None:
    known = cases(
        result("authors", 8.0, evaluation="in-domain"),
        result("best", 4.0, evaluation="in-domain"),
        result("authors", 8.0, evaluation="out-of-domain"),
        result("best", 32.0, evaluation="out-of-domain"),
    )
    tables = comparison_tables(known, [["authors"]])
    assert [table.title for table in tables] == [
        "Damage on in-domain relative to authors, window start papers",
        "Damage on out-of-domain relative to authors, window start papers",
    ]
    assert [cells(known, ["authors"], at=("70 %", "best"), table=number)[0] for number in (0, 1)] == ["0.500", "2.000"]


def test_dense_rows_and_accuracies_are_no_cases() -> None:
    accuracy = row(cell="a", metric="accuracy")
    dense = row(cell="d", method=DENSE, variant=DENSE)
    assert cases_of([accuracy, dense], {"a": 0, "d": 0}) == []


def test_perplexities_of_different_window_starts_are_not_compared() -> None:
    papers, bos = result("authors", 8.0), result("best", 4.0)
    known = cases(papers, replace(bos, window_start="bos"), replace(papers, cell=papers.cell, window_start="papers"))
    assert [(case.start, set(case.perplexity)) for case in known] == [("papers", {"authors"}), ("bos", {"best"})]
    assert all(compare([case], "best", "authors").cases == 0 for case in known)
    tables = comparison_tables(known, [["authors"], ["best"]])
    assert [table.title.rpartition(", ")[2] for table in tables] == ["window start papers", "window start bos"]
