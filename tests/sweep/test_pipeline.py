"""A sweep has the results of separate runs, repeats nothing when interrupted, and refuses what cannot work."""

import json
import math
from collections import Counter
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pandas
import pytest
import tiny

import neuronal_ray.prune.__main__
import neuronal_ray.sweep.__main__
from neuronal_ray.cli.json_lines import JsonLines
from neuronal_ray.report.inputs import read_results
from neuronal_ray.report.schemas import RESULTS
from neuronal_ray.sweep import pipeline as sweep_run
from neuronal_ray.sweep.config import Study, read_override, read_study
from neuronal_ray.sweep.files import Store
from neuronal_ray.workers.pools.protocol import TaskError
from neuronal_ray.workers.shard import ChainTask
from neuronal_ray.workers.tasks import candidates, statistics

REPOSITORY = Path(__file__).parents[2]
QUALITY = ("quality.toml", "quality_ablations.toml")
"""Studies of small models that are not the paper's."""

VARIANTS: dict[str, dict[str, str]] = {
    "Uniform": {"allocation": "uniform"},
    "DSnoT": {"allocation": "uniform", "refinement": "dsnot"},
    "OWL": {"allocation": "owl"},
    "NeuronAL": {"allocation": "neuronal"},
    "Best": {"allocation": "adaptive", "mode": "best", "search-budget": "30"},
    "Released": {"allocation": "neuronal", "mode": "authors"},
    "Pruned stream": {"allocation": "uniform", "score-stream": "pruned"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_model(folder / "model")
    tiny.write_texts(folder)
    return folder


def value_of(word: str) -> str:
    return word if word.isdecimal() else f'"{word}"'


def sweep_file(
    folder: Path,
    path: Path,
    *,
    variants: dict[str, dict[str, str]] = VARIANTS,
    grid: str = 'method = ["magnitude", "wanda"]\nsparsity = [0.5, 0.7]',
    evaluate: str = "",
) -> Path:
    texts = evaluate or f'["{folder / "evaluation.txt"}", "{folder / "other.txt"}"]'
    lines = [
        'title = "tiny"',
        "[options]",
        f'model = "{folder / "model"}"',
        f'calibration = "{folder / "calibration.txt"}"',
        f"evaluate = {texts}",
        "calibration-samples = 6",
        "search-samples = 2",
        f"sequence-length = {tiny.LENGTH}",
        "block-lambdas = [0.05, 0.15]",
        "row-lambdas = [0.0, 0.1]",
        "threads = 1",
        'address = "none"',
        'mode = "paper"',
        f"[grid]\n{grid}",
    ]
    for name, options in variants.items():
        lines += ["[[variant]]", f'name = "{name}"', *(f"{key} = {value_of(word)}" for key, word in options.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def run(file: Path, output: Path, *words: str) -> int:
    return neuronal_ray.sweep.__main__.main([str(file), "--output", str(output), *words])


def values(output: Path) -> dict[tuple[str, str, float, str], float | None]:
    return {(row.method, row.variant, row.sparsity, row.evaluation): row.value for row in read_results([output])}


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "runs"
    assert run(sweep_file(folder, folder / "sweep.toml"), output) == 0
    return output


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_cells_find_what_separate_commands_find(variant: str, folder: Path, whole: Path, tmp_path: Path) -> None:
    found = values(whole)
    for method, sparsity in (("magnitude", 0.7), ("wanda", 0.5)):
        options = {key.replace("-", "_"): word for key, word in VARIANTS[variant].items()}
        texts = f"{folder / 'evaluation.txt'},{folder / 'other.txt'}"
        words = tiny.prune_arguments(
            folder, tmp_path / f"{method}", method=method, sparsity=str(sparsity), evaluate=texts, **options
        )
        assert neuronal_ray.prune.__main__.main(words) == 0
        alone = json.loads((tmp_path / method / "pruning.json").read_text())["evaluation"]
        for name in ("evaluation", "other"):
            assert found[method, variant, sparsity, name] == alone[name]["perplexity"], (method, sparsity, name)
            assert found["dense", "dense", 0.0, name] == alone[name]["dense"]["perplexity"]


@pytest.mark.usefixtures("one_thread")
def test_a_solvers_cells_do_not_disturb_one_another(folder: Path, tmp_path: Path) -> None:
    """Levels solved for one search are not there for the next."""
    variants = {name: VARIANTS[name] for name in ("Best", "NeuronAL", "Uniform")}
    file = sweep_file(
        folder, tmp_path / "x.toml", variants=variants, grid='method = ["sparsegpt"]\nsparsity = [0.5, 0.7]'
    )
    assert run(file, tmp_path / "runs") == 0
    found = values(tmp_path / "runs")
    for name, options in variants.items():
        words = {key.replace("-", "_"): word for key, word in options.items()}
        arguments = tiny.prune_arguments(
            folder, tmp_path / name, method="sparsegpt", sparsity="0.7", neuronal_steps="block", **words
        )
        assert neuronal_ray.prune.__main__.main(arguments) == 0
        alone = json.loads((tmp_path / name / "pruning.json").read_text())["evaluation"]["evaluation"]
        assert found["sparsegpt", name, 0.7, "evaluation"] == alone["perplexity"], name


def test_results_are_one_data_set_that_pandas_reads(whole: Path) -> None:
    frame = pandas.read_parquet(whole / "results")
    assert list(frame.columns) == RESULTS.names
    pruned = frame[frame.method != "dense"]
    assert len(pruned) == 2 * 2 * len(VARIANTS) * 2  # methods, sparsities, variants, texts
    exact = pruned[pruned["mode"] != "authors"]
    assert (exact.achieved - exact.sparsity).abs().max() < 1e-3
    assert (pruned.value > 0).all()
    assert (pruned.peak_bytes > 0).all()
    assert set(pruned[pruned.variant == "NeuronAL"].block_lambda) <= {0.05, 0.15}
    assert json.loads(pruned.config.iloc[0])["sequence_length"] == tiny.LENGTH


def test_what_cells_share_is_done_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return call

    for module, name in ((statistics, "observe_all"), (candidates, "trials")):
        task = getattr(module, name)
        monkeypatch.setattr(module, name, ChainTask(counted(name, task.steps)))
    monkeypatch.setattr(statistics, "rank", counted("rank", statistics.rank))
    variants = {name: VARIANTS[name] for name in ("Uniform", "OWL", "NeuronAL")}
    variants["Block"] = {"allocation": "neuronal", "neuronal-steps": "block"}
    file = sweep_file(folder, tmp_path / "x.toml", variants=variants, grid='sparsity = [0.6]\nmethod = ["wanda"]')
    assert run(file, tmp_path / "runs") == 0
    assert calls["observe_all"] == 1  # 6 sequences of 32 tokens are one chunk
    assert calls["rank"] == 1
    assert calls["trials"] == 2 + 1  # block lambdas once for both NeuronAL cells; row lambda 0 is the block's winner
    seconds = {row.variant: row.search_seconds for row in read_results([tmp_path / "runs"]) if row.method != "dense"}
    assert seconds["Block"] > 0  # trials that the other cell had asked for are counted


class _Stopped(BaseException):
    """As if the process were killed."""


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("results", [1, 3, 4, 7, 10])
def test_a_sweep_resumes_without_repeating_anything(
    results: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variants = {name: VARIANTS[name] for name in ("Uniform", "DSnoT", "NeuronAL", "Released")}
    file = sweep_file(folder, tmp_path / "x.toml", variants=variants, grid='sparsity = [0.6]\nmethod = ["wanda"]')
    assert run(file, tmp_path / "undisturbed") == 0
    keep, kept = Store.keep, []

    def keep_some(self: Store, row: Any) -> None:
        keep(self, row)
        kept.append(row)
        if len(kept) == results:
            raise _Stopped

    with monkeypatch.context() as context:
        context.setattr(Store, "keep", keep_some)
        with pytest.raises(_Stopped):
            run(file, tmp_path / "runs")
    with (tmp_path / "runs" / "journal.jsonl").open("a") as journal:
        journal.write('{"event": "result", "row": {"cell"')  # cut off while it was written
    assert run(file, tmp_path / "runs", "--resume") == 0
    assert values(tmp_path / "runs") == values(tmp_path / "undisturbed")
    events = [line.value for line in JsonLines(tmp_path / "runs" / "journal.jsonl", flag="--x").read()]
    done = Counter((e["row"]["cell"], e["row"]["evaluation"]) for e in events if e["event"] == "result")
    planned = Counter(e["cell"] for e in events if e["event"] == "planned")
    assert set(done.values()) == {1}
    assert set(planned.values()) == {1}
    assert len(planned) == len(variants)


def test_a_cell_that_fails_leaves_the_others_alone(
    folder: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan_run = sweep_run.plan_run

    def failing(config: Any, *args: Any) -> Any:
        if config.allocation == "owl" and config.method == "wanda":
            raise TaskError("out of memory")
        return plan_run(config, *args)

    variants = {name: VARIANTS[name] for name in ("Uniform", "OWL", "NeuronAL")}
    file = sweep_file(folder, tmp_path / "x.toml", variants=variants)
    with monkeypatch.context() as context:
        context.setattr(sweep_run, "plan_run", failing)
        assert run(file, tmp_path / "runs") == 1
    said = capsys.readouterr().err
    assert "2 cells failed; --resume tries them again" in said
    assert "wanda OWL 0.7" in said
    assert "out of memory" in said
    found = values(tmp_path / "runs")
    assert not any(key[:2] == ("wanda", "OWL") for key in found)
    assert found == {key: value for key, value in values(whole).items() if key in found}
    assert run(file, tmp_path / "runs", "--resume") == 0
    assert {key for key in values(tmp_path / "runs") if key[:2] == ("wanda", "OWL")}


def test_a_dry_run_checks_and_says_what_is_shared(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(folder, tmp_path / "x.toml")
    assert run(file, tmp_path / "runs", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert f"{2 * 2 * len(VARIANTS)} cells" in printed
    assert "1 loads, 1 calibration texts" in printed
    assert not (tmp_path / "runs").exists()


# The grid


def study(text: str, tmp_path: Path, **overrides: object) -> Study:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return read_study(path, overrides, output=tmp_path / "runs")


def test_the_grid_is_every_combination_but_those_skipped(tmp_path: Path) -> None:
    text = """
        [options]
        model = "m"
        [options.set.allocation]
        lam = 0.1
        [grid]
        sparsity = [0.6, 0.7]
        method = ["wanda", "sparsegpt"]
        [[variant]]
        name = "OWL"
        allocation = "owl"
        [variant.set.allocation]
        threshold = 7
        [[variant]]
        name = "Uniform"
        allocation = "uniform"
        [[skip]]
        method = "sparsegpt"
        allocation = "owl"
    """
    cells = study(text, tmp_path).cells
    found = {(cell.config.sparsity, cell.config.method, cell.variant) for cell in cells}
    assert found == {(s, "wanda", v) for s in (0.6, 0.7) for v in ("OWL", "Uniform")} | {
        (s, "sparsegpt", "Uniform") for s in (0.6, 0.7)
    }
    (owl, *_) = [cell for cell in cells if cell.variant == "OWL"]
    assert owl.config.settings == {"allocation.lam": 0.1, "allocation.threshold": 7}


def test_overrides_take_the_place_of_options_and_rows_of_the_grid(tmp_path: Path) -> None:
    text = '[options]\nmodel = "m"\nseed = 3\n[grid]\nsparsity = [0.6, 0.7]\n'
    found = study(text, tmp_path, sparsity=0.5, seed=[1, 2]).cells
    assert [(cell.config.sparsity, cell.config.seed) for cell in found] == [(0.5, 1), (0.5, 2)]


def test_a_file_extends_another(tmp_path: Path) -> None:
    base = """
        title = "base"
        [options]
        mode = "paper"
        search-samples = 4
        method = "wanda"
        [grid]
        model = ["a", "b"]
        sparsity = [0.6, 0.7]
        [[variant]]
        name = "OWL"
        allocation = "owl"
    """
    (tmp_path / "base.toml").write_text(base)
    text = 'extends = "base.toml"\n[options]\nmodel = "m"\nsearch-samples = 2\n[grid]\nmethod = ["magnitude", "wanda"]'
    found = study(text, tmp_path)
    assert found.title == "base"
    configs = [(cell.config.method, cell.config.sparsity) for cell in found.cells]
    assert sorted(configs) == [("magnitude", 0.6), ("magnitude", 0.7), ("wanda", 0.6), ("wanda", 0.7)]
    assert {cell.variant for cell in found.cells} == {"OWL"}
    assert {(cell.config.model, cell.config.search_samples, cell.config.mode) for cell in found.cells} == {
        ("m", 2, "paper")
    }


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("sparsity=0.7", ("sparsity", 0.7)),
        ("sparsity=[0.6, 0.7]", ("sparsity", [0.6, 0.7])),
        ("model=gpt2", ("model", "gpt2")),
        ('evaluate=["c4", "ptb"]', ("evaluate", ("c4", "ptb"))),
        ("block-lambdas=[[0.1], [0.2]]", ("block_lambdas", [(0.1,), (0.2,)])),
    ],
)
def test_an_option_on_the_command_line(text: str, found: tuple[str, object]) -> None:
    assert read_override(text) == found


def test_a_cells_id_does_not_depend_on_where_it_runs(tmp_path: Path) -> None:
    text = '[options]\nmodel = "m"\n'
    (here,) = study(text, tmp_path).cells
    (there,) = study(text, tmp_path, address="auto", replicas=4).cells
    (other,) = study(text, tmp_path, seed=1).cells
    assert here.id == there.id != other.id


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "jobs").rglob("*.toml")), ids=lambda path: str(path.relative_to(REPOSITORY))
)
def test_every_study_in_jobs_can_be_read(path: Path) -> None:
    if path.name == "demo.toml":
        pytest.skip("no sweep")
    from neuronal_ray.prune.compose import compose

    found = read_study(path, {}, output=None)
    assert found.reproduces or path.name in QUALITY
    for cell in found.cells:
        compose(cell.config)


def test_every_study_has_a_small_version() -> None:
    names = {path.name for path in (REPOSITORY / "jobs").glob("*.toml")} - {"demo.toml", *QUALITY}
    assert names == {path.name for path in (REPOSITORY / "jobs" / "small").glob("*.toml")}


# Bad input


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optons = 1\n", "did you mean options"),
        ("sparsity = 0.7\n", "options go into [options]"),
        ('[options]\nmodel = "m"\nsparcity = 0.7\n', "did you mean sparsity"),
        ('[options]\nmodel = "m"\n[grid]\nsparsity = []\n', "at least one value"),
        ('[options]\nmodel = "m"\n[grid]\nsparsity = [0.7, 1.5]\n', "outside [0, 1)"),
        ('[options]\nmodel = "m"\n[grid]\nsparsity = ["a"]\n', "not a number"),
        ('[options]\nmodel = "m"\n[grid]\nsparsity = [0.7, 0.7]\n', "comes twice"),
        ('[options]\nmodel = "m"\nsparsity = 0.7\n[[skip]]\nsparsity = 0.7\n', "the grid is empty"),
        ("[grid]\nsparsity = [0.7]\n", "no model"),
        ('[options]\nmodel = "m"\n[[variant]]\nallocation = "owl"\n', "a name of its own"),
        ("x = [\n", "is not TOML"),
        ("extends = 1\n", "extends is 1, expected a sweep file"),
        ('extends = "absent.toml"\n', "absent.toml"),
        ('extends = "x.toml"\n', "expected a sweep file that extends no other"),
    ],
)
def test_a_file_that_cannot_work_is_refused(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert run(path, tmp_path / "runs") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluate": '["wikitxt2"]'}, "did you mean wikitext2"),
        ({"evaluate": '["absent.txt"]'}, "does not exist"),
        ({"grid": 'method = ["sparsegpt"]\nrow-step = ["trim"]'}, "--row-step"),
        ({"grid": 'model = ["absent/model/dir"]'}, "--model"),
        ({"grid": 'calibration = ["absent.txt"]'}, "does not exist"),
    ],
)
def test_a_cell_that_cannot_work_is_refused_by_its_name_before_any_work(
    changes: dict[str, str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = sweep_file(folder, tmp_path / "x.toml", variants={"Uniform": VARIANTS["Uniform"]}, **changes)  # type: ignore[arg-type]
    assert run(file, tmp_path / "runs") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cell " in line
    assert said in line
    assert not (tmp_path / "runs").exists()


def test_directories_of_other_sweeps_are_left_alone(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert run(folder / "sweep.toml", whole) == 2
    assert "add --resume" in capsys.readouterr().err
    other = sweep_file(folder, tmp_path / "x.toml", grid="sparsity = [0.55]")
    assert run(other, whole, "--resume") == 2
    assert "holds another sweep" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    assert run(other, tmp_path / "full") == 2
    assert "is no directory of a sweep" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in whole.rglob("*")}


def test_a_sweep_that_has_grown_may_be_resumed(folder: Path, tmp_path: Path) -> None:
    small = sweep_file(folder, tmp_path / "x.toml", variants={"Uniform": VARIANTS["Uniform"]}, grid="sparsity = [0.6]")
    assert run(small, tmp_path / "runs") == 0
    large = sweep_file(
        folder, tmp_path / "x.toml", variants={"Uniform": VARIANTS["Uniform"]}, grid="sparsity = [0.6, 0.7]"
    )
    assert run(large, tmp_path / "runs", "--resume") == 0
    assert {key[2] for key in values(tmp_path / "runs")} == {0.0, 0.6, 0.7}


def test_a_truncated_file_of_results_is_named_and_written_again(folder: Path, tmp_path: Path) -> None:
    file = sweep_file(folder, tmp_path / "x.toml", variants={"Uniform": VARIANTS["Uniform"]}, grid="sparsity = [0.6]")
    assert run(file, tmp_path / "runs") == 0
    before = values(tmp_path / "runs")
    broken = sorted((tmp_path / "runs" / "results").glob("*.parquet"))[0]
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(ValueError, match=broken.name):
        values(tmp_path / "runs")
    assert run(file, tmp_path / "runs", "--resume") == 0
    assert values(tmp_path / "runs") == before


def test_an_overflow_is_a_result_and_is_not_measured_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = sweep_file(folder, tmp_path / "x.toml", variants={"Uniform": VARIANTS["Uniform"]}, grid="sparsity = [0.6]")
    measured = sweep_run.measured

    def overflowing(pool: Any, evaluations: Any, plan: Any, *args: Any, **kwargs: Any) -> Any:
        for name, score in measured(pool, evaluations, plan, *args, **kwargs):
            yield name, score if plan is None else replace(score, value=math.inf)

    with monkeypatch.context() as context:
        context.setattr(sweep_run, "measured", overflowing)
        assert run(file, tmp_path / "runs") == 0
    before = (tmp_path / "runs" / "journal.jsonl").read_bytes()
    rows = [row for row in read_results([tmp_path / "runs"]) if row.method != "dense"]
    assert {(row.value, row.problem) for row in rows} == {(None, "overflow")}
    assert run(file, tmp_path / "runs", "--resume") == 0
    assert (tmp_path / "runs" / "journal.jsonl").read_bytes() == before
