"""Do runs begin windows as they are told to, or as the dense model reads better, and say which it was?"""

import json
from pathlib import Path

import pytest
import torch
from bos_models import write_model_that_reads
from safetensors.torch import save_file
from tiny import LENGTH, prune_arguments, write_model, write_texts

import neuronal_ray.evaluate.__main__
import neuronal_ray.prune.__main__
from neuronal_ray.evaluate import window_start
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.inputs import Inputs, Reader
from neuronal_ray.report.inputs import read_results, read_run
from neuronal_ray.sweep.__main__ import main as sweep

BEST: dict[str, str | None] = {"mode": "best", "allocation": "uniform", "block_lambdas": None, "row_lambdas": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A model that needs BOS, and one that reads worse after it, with texts."""
    folders = {}
    for after_bos in (True, False):
        folders[after_bos] = tmp_path_factory.mktemp("bos")
        write_model_that_reads(folders[after_bos] / "model", after_bos=after_bos)
        write_texts(folders[after_bos])
    return folders


def prune(folder: Path, output: Path, **changes: str | None) -> dict:
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, output, **changes)) == 0
    return json.loads((output / "pruning.json").read_text())


def evaluate(folder: Path, model: Path, output: Path, *words: str) -> dict:
    words = ("--model", str(model), "--evaluate", str(folder / "evaluation.txt"), "--output", str(output), *words)
    words += ("--sequence-length", str(LENGTH), "--threads", "1", "--address", "none")
    assert neuronal_ray.evaluate.__main__.main(words) == 0
    return json.loads(output.read_text())


def inputs_of(folder: Path, **changes: object) -> Inputs:
    values: dict[str, object] = {
        "model": str(folder / "model"),
        "calibration": str(folder / "calibration.txt"),
        "evaluate": (str(folder / "evaluation.txt"),),
        "calibration_samples": 6,
        "search_samples": 2,
        "sequence_length": LENGTH,
    }
    return Reader().prepare(PruneConfig(**(values | changes)))  # type: ignore[arg-type]


@pytest.mark.parametrize(("after_bos", "used"), [(True, "bos"), (False, "papers")])
def test_best_mode_begins_windows_as_the_dense_model_reads_better(
    after_bos: bool, used: str, folders: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders[after_bos]
    found = prune(folder, tmp_path / "auto", **BEST)
    measured = found["window_start"]["perplexity"]
    assert found["window_start"]["used"] == used == min(measured, key=measured.get), measured
    assert found["calibration"]["window_start"] == used
    assert found["evaluation"]["evaluation"]["window_start"] == used
    assert f"windows of {LENGTH} tokens, window start {used}" in capsys.readouterr().out
    assert f"window start {used}" in (tmp_path / "auto" / "report.html").read_text()
    assert read_run(tmp_path / "auto").scores[0].window_start == used
    told = prune(folder, tmp_path / "told", **BEST, window_start=used)
    assert told["evaluation"] == found["evaluation"], "as if it had been told so"
    assert told["calibration"] == found["calibration"]
    other = prune(folder, tmp_path / "other", **BEST, window_start="papers" if used == "bos" else "bos")
    dense = [run["evaluation"]["evaluation"]["dense"]["perplexity"] for run in (found, other)]
    assert dense[0] < dense[1], dense
    assert other["calibration"]["sha256"] != found["calibration"]["sha256"]


def test_sequences_of_a_bos_run_all_begin_with_bos(folders: dict[bool, Path]) -> None:
    inputs = inputs_of(folders[True], window_start="bos")
    windows = inputs.evaluations.windows["evaluation"].tokens
    for rows in (inputs.calibration, windows):
        assert (rows[:, 0] == 0).all()
        assert (rows[:, 1:] != 0).all()
        assert rows.shape[1] == LENGTH


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_paper_and_authors_mode_keep_the_papers_windows(mode: str, folders: dict[bool, Path], tmp_path: Path) -> None:
    inputs = inputs_of(folders[True], mode=mode)
    assert inputs.window_start.used == "papers"
    assert torch.equal(inputs.calibration, inputs_of(folders[True], window_start="papers").calibration)


def test_evaluate_agrees_with_the_run_that_wrote_the_model(folders: dict[bool, Path], tmp_path: Path) -> None:
    folder = folders[True]
    for mode, used in (("best", "bos"), ("paper", "papers")):
        output = tmp_path / mode
        stated = prune(folder, output, mode=mode, allocation="uniform", block_lambdas=None, row_lambdas=None)
        found = evaluate(folder, output, tmp_path / f"{mode}.json")
        assert found["evaluation"]["evaluation"]["window_start"] == used
        assert found["evaluation"]["evaluation"]["perplexity"] == stated["evaluation"]["evaluation"]["perplexity"]
    dense = evaluate(folder, folder / "model", tmp_path / "dense.json")
    assert dense["window_start"]["used"] == "bos"
    assert dense["window_start"]["perplexity"]["bos"] < dense["window_start"]["perplexity"]["papers"]


def test_what_was_measured_is_not_measured_again(
    folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = folders[True], tmp_path / "out"
    with monkeypatch.context() as context:
        context.setattr("neuronal_ray.prune.pipeline.plan_run", lambda *_: (_ for _ in ()).throw(OSError("full")))
        assert neuronal_ray.prune.__main__.main(prune_arguments(folder, output, **BEST)) == 1
    asked = []
    monkeypatch.setattr("neuronal_ray.prune.window_start.read_both", lambda *_: asked.append(1))
    assert prune(folder, output, **BEST, resume="")["window_start"]["used"] == "bos"
    assert not asked


def test_a_tokenizer_that_adds_no_bos_leaves_auto_with_the_papers_windows() -> None:
    config = PruneConfig(model="builtin", calibration="builtin", evaluate=("builtin",), calibration_samples=8)
    assert Reader().prepare(config).window_start == window_start.WindowStart(used="papers")


def test_tokenized_rows_stay_as_they_are(
    folders: dict[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = torch.randint(2, 90, (6, LENGTH), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": rows}, tmp_path / "rows.safetensors")
    inputs = inputs_of(folders[True], calibration=str(tmp_path / "rows.safetensors"), window_start="bos")
    assert torch.equal(inputs.calibration, rows)
    assert inputs.evaluations.windows["evaluation"].start == "bos"
    assert any("--window-start: ignored" in message for message in caplog.messages), caplog.messages


def test_a_tokenizer_without_bos_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    path = tmp_path / "model" / "tokenizer_config.json"
    known = json.loads(path.read_text())
    known.pop("bos_token")
    path.write_text(json.dumps(known))
    words = prune_arguments(tmp_path, tmp_path / "out", window_start="bos")
    assert neuronal_ray.prune.__main__.main(words) == 2
    assert "--window-start: bos, but the tokenizer" in capsys.readouterr().err


def test_a_sweep_has_the_start_beside_each_perplexity(folders: dict[bool, Path], tmp_path: Path) -> None:
    folder = folders[True]
    lines = [
        '[options]\nthreads = 1\naddress = "none"\nallocation = "uniform"\ncalibration-samples = 6\nsearch-samples = 2',
        f'model = "{folder / "model"}"\ncalibration = "{folder / "calibration.txt"}"',
        f'evaluate = ["{folder / "evaluation.txt"}"]\nsequence-length = {LENGTH}\nsparsity = 0.5',
        '[[variant]]\nname = "best"\n[[variant]]\nname = "paper"\nmode = "paper"',
    ]
    (tmp_path / "x.toml").write_text("\n".join(lines))
    assert sweep([str(tmp_path / "x.toml"), "--output", str(tmp_path / "runs")]) == 0
    rows = read_results([tmp_path / "runs"])
    assert {(row.variant, row.window_start) for row in rows} == {
        ("dense", "bos"), ("dense", "papers"), ("best", "bos"), ("paper", "papers")
    }  # fmt: skip
    dense = {row.window_start: row.value for row in rows if row.variant == "dense"}
    assert all(row.dense == dense[row.window_start] for row in rows), "each beside the dense model's of the same start"
