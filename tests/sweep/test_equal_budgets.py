"""equal-budgets: all variants of a combination remove as many weights as the named one does, to the weight."""

from collections import Counter
from pathlib import Path

import pytest
import tiny

import neuronal_ray.report.__main__
import neuronal_ray.sweep.__main__
from neuronal_ray.cli.json_lines import JsonLines
from neuronal_ray.report.inputs import read_linears, read_results
from neuronal_ray.sweep.config import Study, read_study

REPOSITORY = Path(__file__).parents[2]
VARIANTS = """
[[variant]]
name = "uniform"
allocation = "uniform"
[[variant]]
name = "authors"
mode = "authors"
allocation = "neuronal"
[[variant]]
name = "solver"
allocation = "owl"
method = "sparsegpt"
"""
FLOORED = """
[[variant]]
name = "floored"
mode = "authors"
allocation = "uniform"
"""
TARGET = 0.6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("budgets")
    tiny.write_model(folder / "model")
    tiny.write_texts(folder)
    return folder


def sweep_file(folder: Path, path: Path, variants: str = VARIANTS, keys: str = "") -> Path:
    path.write_text(f"""
        equal-budgets = "authors"
        {keys or 'compare = ["authors", ["uniform", "solver"]]'}
        [options]
        model = "{folder / "model"}"
        calibration = "{folder / "calibration.txt"}"
        evaluate = ["{folder / "evaluation.txt"}", "{folder / "other.txt"}"]
        calibration-samples = 6
        search-samples = 2
        sequence-length = {tiny.LENGTH}
        block-lambdas = [0.1]
        row-lambdas = [0.05]
        threads = 1
        mode = "paper"
        address = "none"
        [grid]
        sparsity = [{TARGET}]
        seed = [0, 1]
        {variants}
    """)
    return path


def run(file: Path, output: Path, *words: str) -> int:
    return neuronal_ray.sweep.__main__.main([str(file), "--output", str(output), *words])


@pytest.mark.usefixtures("one_thread")
def test_all_variants_remove_as_many_weights_and_nothing_is_measured_twice(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = sweep_file(folder, tmp_path / "x.toml"), tmp_path / "runs"
    assert run(file, output) == 0
    rows = [row for row in read_results([output]) if row.method != "dense"]
    assert Counter(row.variant for row in rows) == {"uniform": 4, "authors": 4, "solver": 4}  # seeds, texts
    budgets: dict[int, set[int]] = {0: set(), 1: set()}
    for row in rows:
        linears = read_linears(output / "plans" / f"{row.cell}.parquet")
        pruned, weights = sum(linear.pruned for linear in linears), sum(linear.weights for linear in linears)
        budgets[row.seed].add(pruned)
        assert row.achieved == pruned / weights
        assert row.sparsity == TARGET  # what was asked for
        assert pruned != round(TARGET * weights)  # the released code misses its own target
    assert [len(found) for found in budgets.values()] == [1, 1]

    before = (output / "journal.jsonl").read_bytes()
    assert run(file, output, "--resume") == 0
    assert (output / "journal.jsonl").read_bytes() == before
    assert "budgets     as authors achieves them" in capsys.readouterr().out

    assert neuronal_ray.report.__main__.main([str(output), "--output", str(tmp_path / "r.md")]) == 0
    page = (tmp_path / "r.md").read_text()
    assert "| 60 % | authors | 1.000 | 0 of 2 | 1.000 | 2 | 1.000 | 1.000 |" in page
    assert "Damage on other relative to the best of uniform, solver" in page


@pytest.mark.usefixtures("one_thread")
def test_a_budget_whose_plan_is_lost_is_found_again(folder: Path, tmp_path: Path) -> None:
    file, output = sweep_file(folder, tmp_path / "x.toml"), tmp_path / "runs"
    assert run(file, output, "--option", "seed=0") == 0
    values = {(row.cell, row.evaluation): row.value for row in read_results([output])}
    entries = [line.value for line in JsonLines(output / "journal.jsonl", flag="--x").read()]
    (reference,) = {e["row"]["cell"] for e in entries if e["event"] == "result" and e["row"]["variant"] == "authors"}
    lines = (output / "journal.jsonl").read_text().splitlines()
    lost = [line for line in lines if '"solver"' not in line and not ("planned" in line and reference in line)]
    (output / "journal.jsonl").write_text("\n".join(lost))
    assert run(file, output, "--option", "seed=0", "--resume") == 0
    assert {(row.cell, row.evaluation): row.value for row in read_results([output])} == values


@pytest.mark.usefixtures("one_thread")
def test_a_variant_with_another_budget_fails(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = sweep_file(folder, tmp_path / "x.toml", VARIANTS + FLOORED)
    assert run(file, tmp_path / "runs", "--option", "seed=0") == 1
    printed = capsys.readouterr().err
    assert "model wanda floored 0.6 seed 0" in printed
    assert "weights, expected" in printed
    assert "Traceback" not in printed
    rows = read_results([tmp_path / "runs"])
    assert {row.variant for row in rows} == {"dense", "uniform", "authors", "solver"}


def study(text: str, tmp_path: Path, **overrides: object) -> Study:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return read_study(path, overrides, output=tmp_path / "runs")


def test_a_cells_id_depends_on_the_cell_that_sets_its_budget(folder: Path, tmp_path: Path) -> None:
    """Other options of either are other cells: they are measured again."""

    def ids(variants: str, **overrides: object) -> dict[str, str]:
        file = sweep_file(folder, tmp_path / "x.toml", variants)
        found = read_study(file, {"seed": 0} | overrides, output=tmp_path)
        return {cell.variant: cell.id for cell in found.cells}

    known = ids(VARIANTS)
    assert ids(VARIANTS) == known
    assert known.items() & ids(VARIANTS.replace('"owl"', '"dlp"')).items() == known.items() - {
        ("solver", known["solver"])
    }
    other = ids(VARIANTS.replace('allocation = "neuronal"', 'allocation = "owl"'))
    assert not known.items() & other.items()
    assert not known.items() & ids(VARIANTS, search_samples=1).items()


def test_cells_of_two_sweeps_are_compared_where_they_differ_by_their_variants_alone(tmp_path: Path) -> None:
    def combinations(text: str) -> set[str]:
        return {cell.combination for cell in study(f'[options]\nmodel = "m"\nmode = "paper"\n{text}', tmp_path).cells}

    two = combinations('[grid]\nseed = [0, 1]\n[[variant]]\nname = "A"\n[[variant]]\nname = "B"\nallocation = "owl"')
    assert len(two) == 2
    assert combinations('seed = 1\n[[variant]]\nname = "C"\nallocation = "dlp"') < two
    assert not combinations('seed = 2\n[[variant]]\nname = "A"') & two


@pytest.mark.parametrize(
    ("keys", "variants", "message"),
    [
        ('equal-budgets = "auhtors"', VARIANTS, "'auhtors', expected a variant of every combination"),
        ("equal-budgets = 0.7", VARIANTS, "0.7, expected a variant of every combination"),
        (
            'equal-budgets = "authors"',
            VARIANTS + '[[skip]]\nmode = "authors"\nseed = 1\n',
            "expected a variant of every combination",
        ),
        ('equal-budgets = "authors"', VARIANTS + 'model = "n"\n', "has another model than authors"),
        ('compare = ["autors"]', VARIANTS, "compare has 'autors', expected some of: authors, solver, uniform"),
        ('compare = [["authors", "x"]]', VARIANTS, "compare has ['authors', 'x']"),
        ("compare = [[]]", VARIANTS, "compare has []"),
    ],
)
def test_a_file_that_cannot_work_is_refused(
    keys: str, variants: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(f'{keys}\n[options]\nmodel = "m"\nmode = "paper"\n[grid]\nseed = [0, 1]\n{variants}')
    assert run(path, tmp_path / "runs") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_ablations_of_the_quality_study_are_left_to_one_seed() -> None:
    ablations = read_study(REPOSITORY / "jobs" / "quality_ablations.toml", {}, output=None)
    assert {cell.config.seed for cell in ablations.cells} == {0}
    whole = read_study(REPOSITORY / "jobs" / "quality.toml", {}, output=None)
    assert {cell.config.seed for cell in whole.cells} == {0, 1, 2}
    for known in (ablations, whole):
        by_id = {cell.id: cell for cell in known.cells}
        assert all(by_id[cell.budget_of].variant == "authors" for cell in known.cells if cell.variant != "authors")
