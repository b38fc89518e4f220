"""Every study has the cells that its title, its variants' names and the paper's tables next to it say."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from neuronal_ray.algorithms import registry
from neuronal_ray.prune.compose import Composition, compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.report.published_tables import PUBLISHED
from neuronal_ray.sweep.config import Cell, Study, read_study

JOBS = Path(__file__).parents[2] / "jobs"
STUDIES = sorted(path for path in JOBS.rglob("*.toml") if path.name != "demo.toml")
SMALL = sorted((JOBS / "small").glob("*.toml"))
WHAT_TITLES_TELL = ("method", "allocation", "row_step", "refinement", "pattern", "settings", "schedule")
MODES = ("best", "paper", "authors")


def study_of(path: Path) -> Study:
    return read_study(path, {}, output=None)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def said(composition: Composition, config: PruneConfig) -> set[str]:
    """The plug-ins of a cell, and its mode and schedule."""
    names = {config.method, composition.allocation, config.mode}
    names |= {config.schedule} if composition.allocation == "neuronal" else set()
    return names | {name for name in (composition.pruner.refinement, composition.row_step) if name is not None}


def named(text: str) -> set[str]:
    """The plug-ins that a text names; `Linear`, `Exp` and `Log` are schedules."""
    known = {name for kind in ("methods", "allocations", "refinements", "rows") for name in registry.names(kind)}
    return (known | {"exp", "log", "linear"}) & set(words(text))


def numbers(text: str) -> Iterator[str]:
    """'Tables 18-20 and Figure 1' as 'table 18', 'table 19', 'table 20', 'figure 1'."""
    for kind, listed in re.findall(r"(table|figure)s? ([\d, -]+\d|\d)", text.lower()):
        for part in listed.split(","):
            first, _, last = part.strip().partition("-")
            yield from (f"{kind} {number}" for number in range(int(first), int(last or first) + 1))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(JOBS)))
def test_a_study_runs_what_its_title_names(path: Path) -> None:
    study = study_of(path)
    methods = {cell.config.method for cell in study.cells}
    for name in named(study.title):
        kind = "method" if name in registry.names("methods") else "allocation"
        have = methods if kind == "method" else {compose(cell.config).allocation for cell in study.cells}
        assert name in have, f"{study.title!r} has the {kind}s {', '.join(sorted(have))}"
        if kind == "method":
            assert have == {name}, f"{study.title!r} has the methods {', '.join(sorted(have))}"
    models = {cell.config.model.lower() for cell in study.cells}
    if "built-in" in study.title:
        assert models == {"builtin"}
    elif "13B" in study.title:
        assert all("13b" in model for model in models), models


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(JOBS)))
def test_a_variant_runs_what_its_name_says(path: Path) -> None:
    for cell in study_of(path).cells:
        here = said(compose(cell.config), cell.config)
        missing = named(cell.variant) - here
        assert not missing, f"{cell} has no {', '.join(missing)} but {', '.join(sorted(here))}"
        modes = set(words(cell.variant)) & set(MODES)
        assert modes <= {cell.config.mode}, f"{cell} is in {cell.config.mode} mode"
        lam = re.fullmatch(r"lambda ([\d.]+)", cell.variant)
        assert lam is None or cell.config.block_lambdas == (float(lam[1]),), cell
        budget = re.fullmatch(r"budget (\d+)", cell.variant)
        assert budget is None or cell.config.search_budget == int(budget[1]), cell


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: str(path.relative_to(JOBS)))
def test_a_study_is_set_beside_tables_of_its_own_methods(path: Path) -> None:
    study = study_of(path)
    expected = set(numbers(study.title)) - {"figure 1"}  # drawn by every report that has seconds
    assert expected <= set(study.reproduces), (study.title, study.reproduces)
    methods = {cell.config.method for cell in study.cells}
    for table in tomllib.loads(PUBLISHED.read_text(encoding="utf-8"))["table"]:
        if f"table {table['number']}" in study.reproduces:
            tabled = (
                {str(line[table["rows"].index("method")]) for line in table["values"]}
                if "method" in table["rows"]
                else set()
            )
            tabled |= named(table["title"]) & set(registry.names("methods"))
            assert not tabled or tabled & methods, (
                f"{path.name}: {table['title']} is of {tabled}, the cells of {methods}"
            )


@pytest.mark.parametrize("path", SMALL, ids=lambda path: path.name)
def test_a_small_study_differs_in_size_alone(path: Path) -> None:
    def told(cells: tuple[Cell, ...]) -> set[tuple[str, ...]]:
        return {(cell.variant, *(str(getattr(cell.config, name)) for name in WHAT_TITLES_TELL)) for cell in cells}

    small, large = study_of(path), study_of(JOBS / path.name)
    assert small.title.endswith(" (built-in model)")
    assert told(small.cells) <= told(large.cells), told(small.cells) - told(large.cells)
    assert {cell.variant for cell in small.cells} == {cell.variant for cell in large.cells}
    methods = {cell.config.method for cell in small.cells}
    assert methods in ({cell.config.method for cell in large.cells}, named(small.title)), (small.title, methods)
