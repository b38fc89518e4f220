"""Does a run write what is documented, is the result a model that other tools load, and are its numbers true?"""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import lm_eval.models.huggingface
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from tiny import CONTEXT, LENGTH, prune_arguments, some_text, write_model, write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import neuronal_ray.evaluate.__main__
import neuronal_ray.prune.__main__

COPIED = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
WRITTEN = {"model.safetensors", "pruning.json", "allocation.parquet", "search.parquet", "report.html", "events.jsonl"}
KEYS = {
    "row_step",
    "refinement",
    "pattern",
    "format",
    "model",
    "revision",
    "method",
    "allocation",
    "mode",
    "sparsity",
    "search",
    "calibration",
    "window_start",
    "evaluation",
    "seconds",
    "versions",
    "devices",
    "config",
}
NUM_BLOCKS, HIDDEN, INNER = 3, 32, 48
NUM_PRUNABLE = NUM_BLOCKS * (HIDDEN * (2 * HIDDEN + 2 * 16) + 3 * HIDDEN * INNER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its texts."""
    folder = tmp_path_factory.mktemp("cli")
    write_model(folder / "model")
    write_texts(folder)
    return folder


def prune(folder: Path, output: Path, **changes: str | None) -> dict:
    """Run in this process; pruning.json as it was written."""
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, output, **changes)) == 0
    return json.loads((output / "pruning.json").read_text())


@pytest.fixture(scope="module")
def pruned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the reference run: wanda, neuronal, paper mode."""
    output = tmp_path_factory.mktemp("pruned") / "out"
    prune(folder, output)
    return output


@pytest.fixture(scope="module")
def summary(pruned: Path) -> dict:
    return json.loads((pruned / "pruning.json").read_text())


def is_prunable(name: str) -> bool:
    return name.endswith("proj.weight")


def num_zeros(directory: Path) -> int:
    tensors = load_file(directory / "model.safetensors")
    return sum(int((tensor == 0).sum()) for name, tensor in tensors.items() if is_prunable(name))


# What is written


def test_exactly_the_documented_files_are_written(pruned: Path) -> None:
    assert {path.name for path in pruned.parent.rglob("*") if path.is_file()} == COPIED | WRITTEN
    assert [path.name for path in pruned.parent.iterdir()] == [pruned.name]


def test_what_is_no_weight_is_copied_byte_for_byte(folder: Path, pruned: Path) -> None:
    for name in COPIED:
        assert (pruned / name).read_bytes() == (folder / "model" / name).read_bytes(), name


def test_weights_are_zero_or_what_they_were(folder: Path, pruned: Path) -> None:
    dense, sparse = load_file(folder / "model" / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert list(dense) == list(sparse)
    for name, before in dense.items():
        after = sparse[name]
        assert after.dtype == before.dtype
        expected = torch.where(after == 0, 0.0, before) if is_prunable(name) else before
        assert torch.equal(after.view(torch.int32), expected.view(torch.int32)), name


def test_the_summary_has_the_documented_keys(folder: Path, summary: dict) -> None:
    assert set(summary) == KEYS
    assert summary["format"] == 1
    assert (summary["model"], summary["method"]) == (str(folder / "model"), "wanda")
    assert (summary["allocation"], summary["mode"]) == ("neuronal", "paper")
    assert set(summary["sparsity"]) == {
        "target",
        "achieved",
        "pruned",
        "prunable",
        "input",
        "input_zeros",
        "without_weights",
    }
    assert set(summary["search"]) == {"block", "row"}
    for step in summary["search"].values():
        assert set(step) == {"noun", "selected", "candidates", "seconds"}
        assert all(set(candidate) == {"lambda", "alignment"} for candidate in step["candidates"])
        best = min(step["candidates"], key=lambda candidate: candidate["alignment"])
        assert step["selected"] == best["lambda"]
    calibration = summary["calibration"]
    numbers = {"samples", "distinct", "packed", "search_samples", "sequence_length", "seed"}
    assert set(calibration) == numbers | {"source", "window_start", "sha256"}
    assert (calibration["distinct"], calibration["packed"]) == (6, False)
    assert summary["window_start"] == {"used": "papers", "perplexity": None}
    assert calibration["window_start"] == "papers"
    assert (calibration["samples"], calibration["search_samples"], calibration["sequence_length"]) == (6, 2, LENGTH)
    assert set(summary["evaluation"]) == {"evaluation"}
    entry = {"perplexity", "windows", "sequence_length", "window_start", "dense"}
    assert set(summary["evaluation"]["evaluation"]) == entry
    assert {"loading", "statistics", "ranking", "block search", "row search", "checkpoint"} <= set(summary["seconds"])
    assert {"neuronal_ray", "python", "torch", "transformers"} <= set(summary["versions"])
    assert len(summary["devices"]) == 1
    assert summary["config"]["block_lambdas"] == [0.05, 0.15]


def test_the_saved_tensors_hold_exactly_the_zeros_of_the_budget(pruned: Path, summary: dict) -> None:
    budget = round(0.6 * NUM_PRUNABLE)
    assert num_zeros(pruned) == budget
    assert summary["sparsity"] == {
        "target": 0.6,
        "achieved": budget / NUM_PRUNABLE,
        "pruned": budget,
        "prunable": NUM_PRUNABLE,
        "input": 0.0,
        "input_zeros": 0,
        "without_weights": "",
    }


def test_the_allocation_table_says_what_each_row_of_each_tensor_lost(pruned: Path) -> None:
    tensors = load_file(pruned / "model.safetensors")
    table = pq.read_table(pruned / "allocation.parquet").to_pylist()
    assert [list(row) for row in table] == [["block", "path", "rows", "columns", "pruned", "row_pruned"]] * len(table)
    names = {f"model.layers.{row['block']}.{row['path']}.weight": row for row in table}
    assert set(names) == {name for name in tensors if is_prunable(name)}
    for name, row in names.items():
        zeros = (tensors[name] == 0).sum(dim=1)  # [rows, columns] -> [rows]
        assert row["row_pruned"] == zeros.tolist(), name
        assert (row["rows"], row["columns"], row["pruned"]) == (*tensors[name].shape, int(zeros.sum())), name


def test_the_search_table_has_a_row_per_candidate(pruned: Path, summary: dict) -> None:
    table = pq.read_table(pruned / "search.parquet").to_pylist()
    assert [(row["step"], row["lambda"]) for row in table] == [
        ("block", 0.05),
        ("block", 0.15),
        ("row", 0.0),
        ("row", 0.1),
    ]
    for step, found in summary["search"].items():
        rows = [row for row in table if row["step"] == step]
        assert [row["score"] for row in rows] == [candidate["alignment"] for candidate in found["candidates"]]
        assert [row["lambda"] for row in rows if row["selected"]] == [found["selected"]]
    assert table[2]["score"] == min(row["score"] for row in table[:2]), "row lambda 0 is the block's winner"


def test_every_event_is_a_json_object_with_its_stage(pruned: Path) -> None:
    events = [json.loads(line) for line in (pruned / "events.jsonl").read_text().splitlines()]
    assert all(set(event) == {"seconds", "stage", "done", "total", "note"} for event in events)
    assert [event["seconds"] for event in events] == sorted(event["seconds"] for event in events)
    assert [event["stage"] for event in events if event["done"] == event["total"]] == [
        "loading",
        "zeros of the input",
        "statistics",
        "ranking",
        "block search",
        "row search",
        "evaluation: dense",
        "evaluation: pruned",
        "checkpoint",
    ]


# What other programs make of it


def test_transformers_loads_it_without_a_warning(pruned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transformers_logging.enable_propagation()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model, info = AutoModelForCausalLM.from_pretrained(pruned, output_loading_info=True)
    finally:
        transformers_logging.disable_propagation()
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "Loading weights" not in line]
    assert not lines, lines


@pytest.fixture(scope="module")
def model(pruned: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(pruned).eval()


def test_its_perplexity_is_what_evaluate_measures_on_it(
    folder: Path, pruned: Path, summary: dict, tmp_path: Path
) -> None:
    arguments = ["--evaluate", str(folder / "evaluation.txt"), "--sequence-length", str(LENGTH)]
    arguments += ["--threads", "1", "--address", "none"]
    stated = summary["evaluation"]["evaluation"]
    for directory, perplexity in ((pruned, stated["perplexity"]), (folder / "model", stated["dense"]["perplexity"])):
        results = tmp_path / "results.json"
        code = neuronal_ray.evaluate.__main__.main(["--model", str(directory), "--output", str(results), *arguments])
        assert code == 0
        measured = json.loads(results.read_text())
        assert measured["evaluation"]["evaluation"]["perplexity"] == perplexity
        assert measured["evaluation"]["evaluation"]["windows"] == stated["windows"]


@torch.no_grad()
def test_its_perplexity_is_that_of_transformers_own_loss(
    folder: Path, pruned: Path, summary: dict, model: torch.nn.Module
) -> None:
    tokens = AutoTokenizer.from_pretrained(pruned)((folder / "evaluation.txt").read_text(), return_tensors="pt")
    windows = tokens.input_ids[0].unfold(0, LENGTH, LENGTH)  # [tokens] -> [windows, length]
    losses = [float(model(input_ids=window[None], labels=window[None]).loss) for window in windows]
    stated = summary["evaluation"]["evaluation"]
    assert stated["windows"] == len(losses)
    assert stated["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


@torch.no_grad()
def test_lm_eval_loads_it_unchanged(pruned: Path, model: torch.nn.Module) -> None:
    """`lm_eval --model hf --model_args pretrained=DIR`: its log-likelihood of a document, and a direct computation.

    Its convention is not the window protocol of `neuronal_ray.evaluate`. It puts BOS in front of what the tokenizer
    gives (here BOS and the text, so that BOS itself is predicted too), predicts every token (after a whole context
    from one token before), and sums. The window protocol cuts what the tokenizer gives into windows, predicts all but
    the first token of each, takes each window's mean, and drops what does not fill a window.
    """
    harness = lm_eval.models.huggingface.HFLM(pretrained=str(pruned), device="cpu", batch_size=1)
    for num_words in (5, 40):  # shorter than the context, and longer
        document = some_text(7, num_words)
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document,), idx=0)
        (found,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
        tokens = torch.tensor(AutoTokenizer.from_pretrained(pruned)(document).input_ids)
        assert (len(tokens) > CONTEXT) == (num_words == 40)
        expected = 0.0
        for start in range(0, len(tokens), CONTEXT):
            stop = min(start + CONTEXT, len(tokens))
            # The last window reaches back, to be as long as the others.
            first = max(0, stop - CONTEXT)
            before = torch.tensor([0]) if first == 0 else tokens[first - 1 : first]
            logits = model(torch.cat([before, tokens[first : stop - 1]])[None]).logits[0]
            gained = logits.log_softmax(dim=-1).gather(1, tokens[first:stop, None])[:, 0]  # [predicted]
            expected += float(gained[start - first :].sum())
        assert found == pytest.approx(expected, rel=1e-5), (num_words, found, expected)


# The options


def test_sparsity_0_gives_the_dense_model_back(folder: Path, tmp_path: Path) -> None:
    summary = prune(folder, tmp_path / "out", sparsity="0")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        folder / "model" / "model.safetensors"
    ).read_bytes()
    measured = summary["evaluation"]["evaluation"]
    assert measured["perplexity"] == measured["dense"]["perplexity"]
    assert summary["sparsity"]["pruned"] == 0


def test_a_run_repeated_gives_the_same_bytes(folder: Path, pruned: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path / "out")
    for name in ("model.safetensors", "allocation.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes(), name


def test_another_seed_draws_other_text(folder: Path, tmp_path: Path, summary: dict) -> None:
    other = prune(folder, tmp_path / "out", seed="1", evaluate="none")
    assert other["calibration"]["sha256"] != summary["calibration"]["sha256"]
    assert other["evaluation"] == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_keep_the_dtype_of_the_checkpoint(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    write_model(tmp_path / "model", dtype=dtype)
    prune(folder, tmp_path / "out", model=str(tmp_path / "model"), evaluate="none")
    dense = load_file(tmp_path / "model" / "model.safetensors")
    sparse = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in sparse.values()} == {dtype}
    assert all(((sparse[name] == dense[name]) | (sparse[name] == 0)).all() for name in dense)
    assert num_zeros(tmp_path / "out") == round(0.6 * NUM_PRUNABLE)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, tmp_path / "out", dry_run="")) == 0
    printed = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for word in ("workers", "address none", "memory", "GiB per worker", "LlamaForCausalLM, 3 blocks"):
        assert word in printed, printed
    assert f"{NUM_PRUNABLE:,} prunable weights" in printed
    assert f"{round(0.6 * NUM_PRUNABLE):,} weights removed" in printed
    tokens = {" ".join(line.split()[2:]): line.split()[1] for line in printed.splitlines() if "tokens" in line[:6]}
    assert tokens["dense pass over the calibration text"] == str(6 * LENGTH)
    assert tokens["block step, 2 candidates"] == tokens["row step, 2 candidates"] == str(2 * 2 * LENGTH)


def test_a_dry_run_needs_no_output(folder: Path) -> None:
    arguments = prune_arguments(folder, "OUT", dry_run="")
    del arguments[arguments.index("OUT") - 1 : arguments.index("OUT") + 1]
    assert neuronal_ray.prune.__main__.main(arguments) == 0


def test_overwrite_replaces_the_whole_directory(folder: Path, pruned: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path / "out", sparsity="0.5")
    (tmp_path / "out" / "old.txt").write_text("of an earlier run")
    prune(folder, tmp_path / "out", overwrite="")
    assert {path.name for path in (tmp_path / "out").iterdir()} == COPIED | WRITTEN
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_pruned_model_can_be_pruned_further(folder: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path / "first", sparsity="0.5", evaluate="none")
    prune(folder, tmp_path / "out", sparsity="0.8", evaluate="none", model=str(tmp_path / "first"))
    assert num_zeros(tmp_path / "out") == round(0.8 * NUM_PRUNABLE)


def test_baselines_are_measured_at_the_same_budget(folder: Path, tmp_path: Path, summary: dict) -> None:
    measured = prune(folder, tmp_path / "out", baselines="")["evaluation"]["evaluation"]
    assert set(measured) == {"perplexity", "windows", "sequence_length", "window_start", "dense", "uniform", "block"}
    uniform = prune(folder, tmp_path / "uniform", allocation="uniform")["evaluation"]["evaluation"]
    block = prune(folder, tmp_path / "block", neuronal_steps="block")["evaluation"]["evaluation"]
    assert measured["uniform"] == {"perplexity": uniform["perplexity"]}
    assert measured["block"] == {"perplexity": block["perplexity"]}
    assert measured["perplexity"] == summary["evaluation"]["evaluation"]["perplexity"]


def test_uniform_removes_the_same_share_of_every_row(folder: Path, tmp_path: Path) -> None:
    summary = prune(folder, tmp_path / "out", allocation="uniform")
    assert summary["search"] == {}
    assert pq.read_table(tmp_path / "out" / "search.parquet").num_rows == 0
    assert num_zeros(tmp_path / "out") == round(0.6 * NUM_PRUNABLE)
    for row in pq.read_table(tmp_path / "out" / "allocation.parquet").to_pylist():
        assert {round(count - 0.6 * row["columns"], 9) >= -1 for count in row["row_pruned"]} == {True}
        assert max(row["row_pruned"]) - min(row["row_pruned"]) <= 1, row


@pytest.mark.parametrize("steps", ["block", "row"])
def test_one_step_alone(folder: Path, tmp_path: Path, steps: str) -> None:
    summary = prune(folder, tmp_path / "out", neuronal_steps=steps, evaluate="none")
    assert list(summary["search"]) == [steps]
    assert num_zeros(tmp_path / "out") == round(0.6 * NUM_PRUNABLE)


def test_authors_mode_runs_and_accepts_the_released_code_s_drift(folder: Path, tmp_path: Path) -> None:
    summary = prune(folder, tmp_path / "out", mode="authors")
    assert summary["mode"] == "authors"
    assert summary["sparsity"]["achieved"] == num_zeros(tmp_path / "out") / NUM_PRUNABLE
    assert summary["sparsity"]["achieved"] == pytest.approx(0.6, abs=0.04)
    assert "pruned stream" in summary["seconds"]
    assert "statistics" not in summary["seconds"]


def test_magnitude_takes_no_statistics_of_the_calibration_text(folder: Path, tmp_path: Path) -> None:
    summary = prune(folder, tmp_path / "out", method="magnitude", allocation="uniform")
    assert "statistics" not in summary["seconds"]
    dense = load_file(folder / "model" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        if is_prunable(name):
            before = dense[name].abs()
            for row in range(len(before)):
                gone = tensor[row] == 0
                assert before[row, gone].max() <= before[row, ~gone].min(), (name, row)
    with_search = prune(folder, tmp_path / "searched", method="magnitude")
    assert "statistics" not in with_search["seconds"]
    assert num_zeros(tmp_path / "searched") == round(0.6 * NUM_PRUNABLE)


def test_the_pruned_stream_gives_other_masks_of_the_same_counts(folder: Path, pruned: Path, tmp_path: Path) -> None:
    summary = prune(folder, tmp_path / "out", score_stream="pruned")
    table = "allocation.parquet"
    assert (tmp_path / "out" / table).read_bytes() == (pruned / table).read_bytes()
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(pruned / "model.safetensors")
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert "pruned stream" in summary["seconds"]


# As programs


def run_program(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(neuronal_ray.__path__[0]).parent
    )


@pytest.mark.parametrize("command", [["-m", "neuronal_ray.prune"], ["-m", "neuronal_ray", "prune"]], ids=" ".join)
def test_as_a_program(folder: Path, pruned: Path, tmp_path: Path, command: list[str]) -> None:
    finished = run_program(*command, *prune_arguments(folder, tmp_path / "out"))
    assert finished.returncode == 0, finished.stderr
    assert all(line.startswith("[") for line in finished.stderr.splitlines()), finished.stderr
    assert "perplexity on evaluation" in finished.stdout
    assert str(tmp_path / "out" / "report.html") in finished.stdout
    for name in ("model.safetensors", "allocation.parquet"):
        assert (tmp_path / "out" / name).read_bytes() == (pruned / name).read_bytes(), name


def test_the_script_knows_its_commands() -> None:
    help_text = run_program("-m", "neuronal_ray", "--help")
    assert help_text.returncode == 0
    assert all(command in help_text.stdout for command in ("prune", "evaluate", "report", "benchmark"))
    unknown = run_program("-m", "neuronal_ray", "shrink")
    assert unknown.returncode == 2
    assert len(unknown.stderr.splitlines()) == 1
    assert "'shrink'" in unknown.stderr
