"""Do benchmarks give what lm-eval's own command gives, from local rows in any of the shapes they come in?"""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import FAMILIES, MOE_FAMILIES, VOCABULARY

import neuronal_ray.evaluate.__main__
import neuronal_ray.prune.__main__
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import exact_plan, uniform_rates
from neuronal_ray.evaluate.benchmark_names import ZERO_SHOT, split_names
from neuronal_ray.evaluate.benchmarks import run_benchmark
from neuronal_ray.evaluate.local_rows import find_files, read_rows
from neuronal_ray.evaluate.measure import Evaluations, measure
from neuronal_ray.evaluate.scores import BenchmarkSettings, Score, mean_score
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.tasks.final_model import logits, mask, under_plan
from neuronal_ray.workers.tasks.statistics import describe, rank
from neuronal_ray.workers.worker import Worker

ROWS = 12

HUB: dict[str, Callable[[int], dict[str, Any]]] = {
    "rte": lambda n: {"sentence1": f"the cat {n}", "sentence2": "it sat", "label": n % 2, "idx": n},
    "winogrande": lambda n: {
        "sentence": f"the dog {n} saw _ run",
        "option1": "it",
        "option2": "cats",
        "answer": "12"[n % 2],
    },
    "boolq": lambda n: {"question": f"did it run {n}", "passage": "the owl flew", "label": n % 2, "idx": n},
    "hellaswag": lambda n: {
        "activity_label": "Run",
        "ctx_a": f"a dog {n}",
        "ctx_b": "it",
        "ctx": "",
        "endings": ["ran", "sat", "flew", "saw"],
        "label": str(n % 4),
        "source_id": "a",
    },
    "arc_easy": lambda n: {
        "id": str(n),
        "question": f"who ran {n}",
        "choices": {"text": ["dog", "cat", "owl"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[n % 3],
    },
    "openbookqa": lambda n: {
        "id": str(n),
        "question_stem": f"owls {n}",
        "choices": {"text": ["fly", "run"], "label": ["A", "B"]},
        "answerKey": "AB"[n % 2],
    },
}
"""Rows in the hub's field names."""

OTHER: dict[str, Callable[[dict[str, Any], int], dict[str, Any]]] = {
    "rte": lambda row, n: {
        "premise": row["sentence1"],
        "hypothesis": row["sentence2"],
        "label": ("entailment", "not_entailment")[n % 2],
        "idx": n,
    },
    "boolq": lambda row, n: {"question": row["question"], "passage": row["passage"], "answer": bool(n % 2)},
    "hellaswag": lambda row, n: row | {"label": n % 4},
    "arc_easy": lambda row, _: {
        "id": row["id"],
        "question": {
            "stem": row["question"],
            "choices": [{"text": t, "label": c} for t, c in zip(row["choices"]["text"], "ABC", strict=True)],
        },
        "answerKey": row["answerKey"],
    },
    "openbookqa": lambda row, n: {"query": row["question_stem"], "choices": row["choices"]["text"], "gold": n % 2},
}
"""The same rows in the shapes of their sources."""


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for task, row in HUB.items():
        split = "test" if task in ("arc_easy", "openbookqa") else "validation"
        write_rows(folder, f"{task}_{split}.jsonl", [row(n) for n in range(ROWS)])
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("zeroshot") / "model")


def worker_of(path: Path) -> Worker:
    spec = tiny.cpu_spec(path, LinearPruner(method="magnitude"))
    return Worker.build(spec)


@pytest.mark.parametrize("task", list(OTHER))
def test_rows_of_a_source_become_the_hubs(task: str, tmp_path: Path) -> None:
    rows = [HUB[task](n) for n in range(4)]
    path = write_rows(tmp_path, "rows.jsonl", [OTHER[task](row, n) for n, row in enumerate(rows)])
    for ours, hub in zip(read_rows(path, task).to_list(), rows, strict=True):
        wanted = hub | ({"id": ""} if task == "openbookqa" else {})
        assert {key: ours[key] for key in wanted if key != "idx"} == {k: v for k, v in wanted.items() if k != "idx"}


def test_the_hubs_rows_stay_as_they_are(data: Path) -> None:
    for task, row in HUB.items():
        (path,) = data.glob(f"{task}_*.jsonl")
        assert read_rows(path, task).to_list() == [row(n) for n in range(ROWS)], task


def test_parquet_rows_are_read_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [HUB["rte"](n) for n in range(5)]
    (tmp_path / "rte").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rte" / "validation.parquet")
    files = find_files(tmp_path, "rte", default="validation")
    assert list(files) == ["validation"]
    assert read_rows(files["validation"], "rte").to_list() == rows


def test_a_task_does_not_take_the_files_of_one_named_alike(tmp_path: Path) -> None:
    write_rows(tmp_path, "arc_test.jsonl", [{}])
    write_rows(tmp_path, "arc_easy_test500.jsonl", [{}])
    assert find_files(tmp_path, "arc_easy", default="test") == {"test": tmp_path / "arc_easy_test500.jsonl"}
    assert find_files(tmp_path, "arc", default="test") == {"test": tmp_path / "arc_test.jsonl"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}\n", "row 1"),
        ("[1]\n", "is a JSON list"),
        ("{\n", "not JSON"),
        ("[" * 100_000 + "\n", "nested too deeply"),
        ('{"premise": "\\ud800"}\n', "surrogate"),
        ("", "is empty"),
        ('{"premise": "a", "hypothesis": "b", "label": "perhaps"}\n', "row 1"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(content: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rte_val.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="--task-data") as refused:
        read_rows(path, "rte")
    assert said in str(refused.value)


def test_a_truncated_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rte.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        read_rows(path, "rte")


def test_missing_rows_name_the_file_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rte_validation\.jsonl"):
        find_files(tmp_path, "rte", default="validation")


def test_names_are_texts_or_benchmarks() -> None:
    assert split_names(["wikitext2", "zero-shot", "x.txt"]) == (("wikitext2", "x.txt"), ZERO_SHOT)
    assert split_names(["gsm8k", "rte"]) == ((), ("gsm8k", "rte"))


@pytest.mark.parametrize(
    ("name", "meant"), [("hellaswg", "hellaswag"), ("wikitext-2", "wikitext2"), ("arc-easy", "arc_easy")]
)
def test_a_typo_is_answered_with_names_near_it(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match="did you mean") as refused:
        split_names([name])
    assert meant in str(refused.value)


def test_the_mean_and_its_error() -> None:
    scores = [Score(metric="accuracy", value=value, error=0.03, rows=10) for value in (0.2, 0.4, 0.9)]
    mean = mean_score(scores)
    assert mean.value == pytest.approx(0.5)
    assert mean.error == pytest.approx(0.03 / math.sqrt(3))


@pytest.mark.usefixtures("one_thread")
def test_a_plan_changes_the_answers_only_while_it_is_asked(model: Path, data: Path) -> None:
    worker = worker_of(model)
    rank(worker)
    layout: Layout = worker.layout
    plan = exact_plan(layout, uniform_rates(layout, lambda _: 0.9), target=0.9)
    settings = BenchmarkSettings(data=data)
    before = {spec.linear: worker.replica.weight(spec).clone() for spec in layout}
    with under_plan(worker, plan):
        for spec in layout:
            assert torch.equal(
                worker.replica.weight(spec) == 0, mask(worker, spec.linear, plan) | (before[spec.linear] == 0)
            )
    run_benchmark(worker, "hellaswag", plan, settings)
    for spec in layout:
        assert torch.equal(worker.replica.weight(spec), before[spec.linear])


@pytest.mark.usefixtures("one_thread")
def test_accuracies_equal_those_of_lm_evals_own_command(model: Path, data: Path, tmp_path: Path) -> None:
    """The pruned model in our worker, and lm-eval's command line on the directory that was saved."""
    folder = tmp_path / "texts"
    folder.mkdir()
    tiny.write_texts(folder)
    tasks = ("rte", "arc_easy", "hellaswag")
    words = tiny.prune_arguments(
        folder, tmp_path / "out", model=str(model), allocation="uniform", evaluate=",".join(tasks), task_data=str(data)
    )
    assert neuronal_ray.prune.__main__.main(words) == 0
    ours = json.loads((tmp_path / "out" / "pruning.json").read_text())["evaluation"]
    included = tmp_path / "configurations"
    included.mkdir()
    for task in tasks:
        (path,) = data.glob(f"{task}_*.jsonl")
        split = path.stem.removeprefix(f"{task}_")
        (included / f"{task}.yaml").write_text(_local_configuration(task, path, split))
    command = [
        sys.executable, "-m", "lm_eval", "run", "--model", "hf",
        "--model_args", f"pretrained={tmp_path / 'out'},dtype=float32",
        "--tasks", ",".join(f"local_{task}" for task in tasks), "--include_path", str(included),
        "--device", "cpu", "--batch_size", "1", "--output_path", str(tmp_path / "lm_eval"),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (written,) = (tmp_path / "lm_eval").rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]
    for task in tasks:
        assert ours[task]["accuracy"] == pytest.approx(theirs[f"local_{task}"]["acc,none"], abs=1e-12), task
        assert ours[task]["stderr"] == pytest.approx(theirs[f"local_{task}"]["acc_stderr,none"], abs=1e-12), task
        assert ours[task]["rows"] == ROWS


def _local_configuration(task: str, path: Path, split: str) -> str:
    """lm-eval's configuration of the task, included, with the data set read from a file."""
    from lm_eval.tasks import TaskManager

    entry = TaskManager().task_index[task]
    absent = ("training_split", "validation_split", "test_split")
    lines = [
        f"include: {entry.yaml_path}",
        f"task: local_{task}",
        "dataset_path: json",
        "dataset_name: null",
        "dataset_kwargs:",
        "  data_files:",
        f"    {split}: {path}",
        *(f"{key}: {split if key == f'{split}_split' else 'null'}" for key in absent),
    ]
    return "\n".join(lines) + "\n"


@pytest.mark.usefixtures("one_thread")
def test_a_chain_of_shards_gives_the_accuracies_of_the_whole_model(model: Path, data: Path) -> None:
    evaluations = Evaluations(benchmarks=("arc_easy", "boolq"), settings=BenchmarkSettings(data=data))
    spec = worker_of(model).spec
    found = []
    for shards in (1, 2, 3):
        pool = InProcessPool(replace(spec, shards=shards))
        pool.each(rank)
        plan = exact_plan(pool.first(describe), uniform_rates(pool.first(describe), lambda _: 0.6), target=0.6)
        found.append([measure(pool, evaluations, one, Progress(quiet=True), label="") for one in (None, plan)])
    assert found[0] == found[1] == found[2]


def test_a_tokenizer_with_neither_bos_nor_eos_is_evaluated(model: Path, data: Path, tmp_path: Path) -> None:
    without = tmp_path / "without"
    shutil.copytree(model, without)
    file = without / "tokenizer_config.json"
    kept = {key: value for key, value in json.loads(file.read_text()).items() if key not in ("bos_token", "eos_token")}
    file.write_text(json.dumps(kept))
    score = run_benchmark(worker_of(without), "rte", None, BenchmarkSettings(data=data))
    assert score.rows > 0
    assert 0 <= score.value <= 1


def test_evaluate_prints_the_score_and_its_error(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model",
        str(model),
        "--evaluate",
        "rte",
        "--task-data",
        str(data),
        "--task-limit",
        "8",
        "--address",
        "none",
    ]
    assert neuronal_ray.evaluate.__main__.main(words) == 0
    printed = capsys.readouterr().out
    assert "rte: accuracy" in printed
    assert "(8 questions)" in printed


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", [*FAMILIES, *MOE_FAMILIES])
def test_the_whole_model_under_a_plan_is_the_one_passed_block_by_block(
    name: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    """lm-eval runs the model itself; perplexity runs its blocks one by one."""
    worker = worker_of(checkpoint_dir(name))
    rank(worker)
    layout: Layout = worker.layout
    plan = exact_plan(layout, uniform_rates(layout, lambda _: 0.6), target=0.6)
    tokens = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    with under_plan(worker, plan), torch.no_grad():
        whole = worker.replica.stream.model(tokens).logits
    by_block = torch.cat(list(logits(worker, tokens, plan, lambda _, chunks: chunks)))
    dense = torch.cat(list(logits(worker, tokens, None, lambda _, chunks: chunks)))
    torch.testing.assert_close(whole, by_block, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(whole, dense, atol=1e-3)


@pytest.mark.usefixtures("one_thread")
def test_the_seven_tasks_have_a_mean(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows"
    shutil.copytree(data, rows)
    shutil.copy(rows / "arc_easy_test.jsonl", rows / "arc_challenge_test.jsonl")
    words = ["--evaluate", "zero-shot", "--task-data", str(rows), "--output", str(tmp_path / "found.json")]
    assert neuronal_ray.evaluate.__main__.main(["--model", str(model), "--address", "none", *words]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["evaluation"]
    assert list(found) == [*ZERO_SHOT, "mean"]
    assert found["mean"]["accuracy"] == pytest.approx(sum(found[task]["accuracy"] for task in ZERO_SHOT) / 7)
    assert found["mean"]["rows"] == 7 * ROWS
    assert "mean of the 7 zero-shot tasks: accuracy" in capsys.readouterr().out


def test_rows_that_the_hub_does_not_give_are_said_before_any_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    tiny.write_texts(folder)
    words = tiny.prune_arguments(folder, tmp_path / "out", model=str(model), evaluate="winogrande")
    assert neuronal_ray.prune.__main__.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--evaluate: the rows of winogrande could not be read" in line
    assert "--task-data" in line
    assert not (tmp_path / "out").exists()
