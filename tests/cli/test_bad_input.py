"""Is bad input refused with exit code 2, in one line that names the flag, and is nothing left behind?"""

import json
import logging
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, LENGTH, VOCABULARY, prune_arguments, write_model, write_texts
from transformers import DistilBertConfig, T5Config

import neuronal_ray
from neuronal_ray.evaluate.__main__ import main as evaluate
from neuronal_ray.prune.__main__ import main as prune

TIED_MODEL = """
from transformers import LlamaForCausalLM

class TiedForCausalLM(LlamaForCausalLM):
    def tie_weights(self, *arguments, **keywords):
        super().tie_weights(*arguments, **keywords)
        blocks = self.model.layers
        blocks[{}].mlp.up_proj.weight = blocks[0].mlp.gate_proj.weight
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good model with its texts, and beside them all that is bad."""
    folder = tmp_path_factory.mktemp("bad")
    write_model(folder / "model")
    write_texts(folder)
    write_bad_models(folder)
    write_bad_texts(folder)
    return folder


def write_bad_models(folder: Path) -> None:
    good = load_file(folder / "model" / "model.safetensors")
    down, up = "model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def variant(name: str, tensors: dict[str, torch.Tensor] | None = None) -> Path:
        shutil.copytree(folder / "model", folder / name)
        if tensors is not None:
            save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        return folder / name

    nan = good[down].clone()
    nan[3, 5] = torch.nan
    variant("nan", good | {down: nan})
    first, embedding = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    variant("nan-first", good | {first: torch.full_like(good[first], torch.nan)})
    variant("nan-embedding", good | {embedding: torch.full_like(good[embedding], torch.nan)})
    for name, key in (("nan-head", "lm_head.weight"), ("nan-norm", "model.norm.weight")):
        variant(name, good | {key: torch.full_like(good[key], torch.nan)})
    variant("infinite", good | {down: torch.full_like(nan, torch.inf)})
    variant("overflowing", good | {up: good[up] * 1e38})
    variant("lacking", {name: tensor for name, tensor in good.items() if name != up})
    variant("misshapen", good | {up: good[up][:-1].clone()})
    stored = (folder / "model" / "model.safetensors").read_bytes()
    for name, length in (("truncated", len(stored) - 1000), ("beheaded", 100), ("blank", 0)):
        (variant(name) / "model.safetensors").write_bytes(stored[:length])
    (variant("weightless") / "model.safetensors").unlink()
    (variant("unconfigured") / "config.json").unlink()
    (variant("misconfigured") / "config.json").write_text("{]")
    (variant("wordless") / "tokenizer.json").unlink()
    config = json.loads((folder / "model" / "config.json").read_text())
    quantized = config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (variant("quantized") / "config.json").write_text(json.dumps(quantized))
    tied = config | {"auto_map": {"AutoModelForCausalLM": "tied.TiedForCausalLM"}}
    for name, block in (("tied-inside", 0), ("tied-across", 2)):
        (variant(name) / "config.json").write_text(json.dumps(tied))
        (folder / name / "tied.py").write_text(TIED_MODEL.format(block))
    T5Config(num_layers=2).save_pretrained(variant("translator"))
    DistilBertConfig(n_layers=3).save_pretrained(variant("encoder"))
    (variant("garbled") / "tokenizer.json").write_text("{]")


def write_bad_texts(folder: Path) -> None:
    for name in ("empty.txt", "empty.jsonl", "text.csv", "text.docx"):
        (folder / name).write_text("")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "empty.parquet")
    (folder / "short.txt").write_text("ten words")
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (folder / "broken.jsonl").write_text('{"text": "a"}\n{"text":\n')
    (folder / "other.jsonl").write_text('{"count": 3}\n')
    pq.write_table(pa.table({"count": [3]}), folder / "other.parquet")
    (folder / "text.parquet").write_text("no table")
    (folder / "text.safetensors").write_text("no tensors")
    save_file({"input_ids": torch.full((6, LENGTH), VOCABULARY)}, folder / "unknown.safetensors")
    save_file({"input_ids": torch.full((6, LENGTH), -1)}, folder / "negative.safetensors")
    save_file({"input_ids": torch.zeros(5, LENGTH, dtype=torch.int64)}, folder / "few.safetensors")
    save_file({"input_ids": torch.zeros(6, LENGTH - 1, dtype=torch.int64)}, folder / "narrow.safetensors")
    save_file({"input_ids": torch.zeros(6, LENGTH)}, folder / "floats.safetensors")
    save_file({"tokens": torch.zeros(6, LENGTH, dtype=torch.int64)}, folder / "misnamed.safetensors")
    save_file({"input_ids": torch.zeros(6, CONTEXT + 1, dtype=torch.int64)}, folder / "long.safetensors")
    (folder / "sparsity.toml").write_text("sparsity = 1.5\n")
    (folder / "unknown.toml").write_text("sparcity = 0.5\n")
    (folder / "malformed.toml").write_text("sparsity = [0.5\n")
    (folder / "file").write_text("a regular file")


def run_main(
    capfd: pytest.CaptureFixture[str], arguments: list[str], command: Callable[[list[str]], int] = prune
) -> list[str]:
    """Lines on stderr of a run in this process that ends with exit code 2, progress aside.

    Warnings and logging go to stderr as they would in a process of their own: pytest's handlers step aside.
    """
    root, library = logging.getLogger(), logging.getLogger("transformers")
    before = root.handlers, library.handlers
    root.handlers, library.handlers = [], [logging.StreamHandler(sys.stderr)]
    capfd.readouterr()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            try:
                code = command(arguments)
            except SystemExit as stopped:
                code = stopped.code
    finally:
        root.handlers, library.handlers = before
    printed = capfd.readouterr()
    assert code == 2, (code, printed)
    assert not [warning for warning in warned if issubclass(warning.category, UserWarning)]
    assert printed.out == ""
    return [line for line in printed.err.splitlines() if not line.startswith("[")]


def assert_refused(
    capfd: pytest.CaptureFixture[str], folder: Path, work: Path, flag: str, *expected: str, **changes: str | None
) -> None:
    """A run with these changes ends as the first line of this file says; `work` is an empty directory."""
    arguments = prune_arguments(folder, work / "new" / "out", **changes)
    lines = run_main(capfd, arguments)
    assert len(lines) == 1, lines
    assert lines[0].startswith("neuronal-ray prune: "), lines
    for part in (flag, *expected):
        assert part in lines[0], lines
    assert not list(work.iterdir()), list(work.rglob("*"))


@pytest.mark.parametrize("value", ["-0.1", "1", "1.5", "nan", "much", ""])
def test_sparsity(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, value: str) -> None:
    # Written with "=": an empty word is left out by prune_arguments.
    arguments = [*prune_arguments(folder, tmp_path / "out"), f"--sparsity={value}"]
    lines = run_main(capfd, arguments)
    assert len(lines) == 1
    assert "--sparsity" in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere/at/all", "nowhere/at/all"),
        ("weightless", "model.safetensors is missing"),
        ("unconfigured", "config.json"),
        ("misconfigured", "config.json"),
        ("wordless", "tokenizer"),
        ("truncated", "truncated"),
        ("beheaded", "truncated"),
        ("blank", "truncated"),
        ("lacking", "model.layers.1.mlp.up_proj.weight"),
        ("misshapen", "model.layers.1.mlp.up_proj.weight"),
        ("nan", "NaN or infinite weights in block 1 mlp.down_proj"),
        ("nan-first", "NaN or infinite weights in block 0 mlp.up_proj"),
        ("nan-embedding", "NaN or infinite weights in model.embed_tokens.weight"),
        ("nan-head", "NaN or infinite weights in lm_head.weight"),
        ("nan-norm", "NaN or infinite weights in model.norm.weight"),
        ("infinite", "NaN or infinite weights in block 1 mlp.down_proj"),
        ("overflowing", "NaN or infinite activations in block"),
        ("quantized", "quantized"),
        ("translator", "encoder-decoder"),
        ("encoder", "Unrecognized configuration class"),
        ("garbled", "tokenizer"),
    ],
)
def test_model(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, name: str, expected: str) -> None:
    assert_refused(capfd, folder, tmp_path, "--model", expected, model=str(folder / name))


@pytest.mark.parametrize("name", ["tied-inside", "tied-across"])
def test_a_model_with_tied_linears(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path.with_suffix(".modules")))
    model = str(folder / name)
    assert_refused(capfd, folder, tmp_path, "--model", "tied", model=model, trust_remote_code="")


@pytest.mark.parametrize("changes", [{"mode": "authors"}, {"method": "magnitude"}, {"score_stream": "pruned"}], ids=str)
def test_weights_that_make_activations_overflow(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, changes: dict[str, str]
) -> None:
    arguments = prune_arguments(folder, tmp_path / "out", model=str(folder / "overflowing"), **changes)
    (line,) = run_main(capfd, arguments)
    assert "--model" in line
    assert "infinite activations" in line
    kept = {path for path in tmp_path.rglob("*.safetensors") if path.parts[-3] == ".out.journal"}
    assert {path for path in tmp_path.rglob("*") if path.is_file() and path.name != "question.json"} == kept
    assert bool(kept) == (changes == {"mode": "authors"}), "candidates that were finished before stay for --resume"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("c5", "expected one of c4, wikitext2, ptb, builtin"),
        ("text.docx", ".jsonl"),
        ("text.csv", "Empty CSV file"),
        ("absent.txt", "does not exist"),
        ("empty.txt", "too short"),
        ("empty.jsonl", "is empty"),
        ("empty.parquet", "is empty"),
        ("short.txt", "too short"),
        ("latin.txt", "UTF-8"),
        ("broken.jsonl", "line 2"),
        ("other.jsonl", "'text'"),
        ("other.parquet", "'text'"),
        ("text.parquet", "not a Parquet file"),
        ("text.safetensors", "not a safetensors file"),
        ("unknown.safetensors", f"token id {VOCABULARY} is outside the model's vocabulary"),
        ("negative.safetensors", "token id -1 is outside the model's vocabulary"),
        ("few.safetensors", "--calibration-samples 6"),
        ("narrow.safetensors", f"--sequence-length {LENGTH}"),
        ("floats.safetensors", "int64"),
        ("misnamed.safetensors", "'input_ids'"),
    ],
)
def test_calibration(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, source: str, expected: str
) -> None:
    given = str(folder / source) if "." in source else source
    assert_refused(capfd, folder, tmp_path, "--calibration", expected, calibration=given)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("c5", "is neither a text nor a task of lm-eval"),
        ("text.docx", ".jsonl"),
        ("text.csv", "Empty CSV file"),
        ("absent.txt", "does not exist"),
        ("empty.txt", "at least one window"),
        ("short.txt", "at least one window"),
        ("unknown.safetensors", f"token id {VOCABULARY}"),
    ],
)
def test_evaluate(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, source: str, expected: str) -> None:
    given = str(folder / source) if "." in source else source
    assert_refused(capfd, folder, tmp_path, "--evaluate", expected, evaluate=given)


def test_evaluation_rows_longer_than_the_context(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    arguments = prune_arguments(folder, tmp_path / "out", evaluate=str(folder / "long.safetensors"))
    *warned, line = run_main(capfd, arguments)
    assert f"rows of {folder / 'long.safetensors'} are longer than the model's {CONTEXT}" in line
    assert all("--sequence-length" in warning and "is ignored" in warning for warning in warned)


def test_two_evaluation_texts_of_one_name(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    sources = f"{folder / 'other.txt'},{folder / 'other.txt'}"
    assert_refused(capfd, folder, tmp_path, "--evaluate", "'other'", evaluate=sources)


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--method", {"method": "magic"}),
        ("--allocation", {"allocation": "magic"}),
        ("--mode", {"mode": "magic"}),
        ("--set method.power", {"set": "method.power=2"}),
        ("--set allocation.lam", {"set": "allocation.lam=2"}),
        ("--set allocation.steps", {"set": "allocation.steps=row"}),
        ("--set", {"set": "power"}),
        ("--sequence-length", {"sequence_length": str(CONTEXT + 1)}),
        ("--sequence-length", {"sequence_length": "0"}),
        ("--search-samples", {"search_samples": "7"}),
        ("--calibration-samples", {"calibration_samples": "0", "search_samples": "0"}),
        ("--block-lambdas", {"block_lambdas": "2"}),
        ("--replicas", {"replicas": "2", "address": "none"}),
        ("--shards", {"shards": "4", "address": "none"}),
        ("--shards", {"shards": "4", "address": "local"}),
        ("--threads", {"threads": "1000000000"}),
        ("--threads", {"threads": "1000000000", "address": "local"}),
        ("--calibration-samples", {"calibration_samples": "1000000000000"}),
        ("--output", {"output": None}),
        ("--sparcity", {"sparcity": "0.5"}),
    ],
    ids=str,
)
def test_options(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, flag: str, changes: dict[str, str | None]
) -> None:
    if changes == {"output": None}:
        arguments = prune_arguments(folder, "OUT")
        index = arguments.index("OUT")
        lines = run_main(capfd, arguments[: index - 1] + arguments[index + 1 :])
        assert len(lines) == 1
        assert "--output" in lines[0]
        return
    assert_refused(capfd, folder, tmp_path, flag, **changes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("malformed.toml", "is not TOML"),
        ("absent.toml", "does not exist"),
        ("unknown.toml", "expected one of: model, "),
        ("file", "is not TOML"),
    ],
)
def test_config_file(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, name: str, expected: str) -> None:
    assert_refused(capfd, folder, tmp_path, "--config", expected, config=str(folder / name))


def test_a_config_file_s_value_out_of_range(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    arguments = prune_arguments(folder, tmp_path / "out", config=str(folder / "sparsity.toml"))
    index = arguments.index("--sparsity")
    (line,) = run_main(capfd, arguments[:index] + arguments[index + 2 :])
    assert "--sparsity: 1.5" in line


# Where nothing can or may be written


def test_an_output_below_a_regular_file(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    (line,) = run_main(capfd, prune_arguments(folder, folder / "file" / "out"))
    assert "--output" in line
    assert (folder / "file").read_text() == "a regular file"


def test_an_output_that_exists(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (line,) = run_main(capfd, prune_arguments(folder, tmp_path / "out"))
    assert "--output" in line
    assert "--overwrite" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_an_output_that_is_a_file(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    (line,) = run_main(capfd, prune_arguments(folder, tmp_path / "out", overwrite=""))
    assert "--output" in line
    assert (tmp_path / "out").read_text() == "precious"


def test_only_an_earlier_run_is_overwritten(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    monkeypatch.chdir(tmp_path / "home")
    for output in (tmp_path / "home", Path()):
        (line,) = run_main(capfd, prune_arguments(folder, output, overwrite=""))
        assert "--overwrite" in line
        assert "pruning.json" in line
    assert [path.name for path in tmp_path.rglob("*")] == ["home", "thesis.txt"]


def test_a_disk_without_room_for_the_model(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = (folder / "model" / "model.safetensors").stat().st_size
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size // 2))
    (line,) = run_main(capfd, prune_arguments(folder, tmp_path / "below" / "out"))
    assert "--output" in line
    assert "GiB free" in line
    assert not list(tmp_path.iterdir())


def test_a_failed_run_leaves_the_earlier_one(capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    assert prune(prune_arguments(folder, tmp_path / "out", evaluate="none")) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run_main(capfd, prune_arguments(folder, tmp_path / "out", overwrite="", model=str(folder / "nan")))
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Where workers cannot run


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("address", ["none", "local"])
def test_cuda_on_a_machine_without(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, address: str
) -> None:
    assert_refused(capfd, folder, tmp_path, "--device", "CUDA", device="cuda", address=address)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:9", "nothing to join at '127.0.0.1:9'"),
        ("ray://127.0.0.1:9", "nothing to join at 'ray://127.0.0.1:9'"),
        ("somewhere", "HOST:PORT"),
        ("somewhere:", "HOST:PORT"),
        ("http://127.0.0.1:8265", "ray job submit --address http://127.0.0.1:8265 -- python -m"),
        ("127.0.0.1:99999", "HOST:PORT"),
    ],
)
def test_a_ray_that_is_not_there(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, address: str, expected: str
) -> None:
    assert_refused(capfd, folder, tmp_path, "--address", expected, address=address)


# The other command, and a process of its own


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--model", {"model": "nowhere/at/all"}),
        ("--model", {"model": "nan"}),
        ("--evaluate", {"evaluate": "c5"}),
        ("--evaluate", {"evaluate": "none"}),
        ("--sequence-length", {"sequence-length": str(CONTEXT + 1)}),
        ("--output", {"output": "absent/results.json"}),
    ],
    ids=str,
)
def test_evaluate_s_options(
    capfd: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, flag: str, changes: dict[str, str]
) -> None:
    options = {"model": "model", "evaluate": str(folder / "evaluation.txt"), "threads": "1", "address": "none"}
    options |= {"sequence-length": str(LENGTH), "output": "results.json"}
    options |= changes
    options |= {"model": str(folder / options["model"]), "output": str(tmp_path / options["output"])}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    lines = run_main(capfd, arguments, evaluate)
    assert len(lines) == 1, lines
    assert lines[0].startswith("neuronal-ray evaluate: "), lines
    assert flag in lines[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["nan", "lacking"])
def test_as_a_program(folder: Path, tmp_path: Path, name: str) -> None:
    """What the other tests watch from inside: the whole of stderr, warnings and native code included."""
    arguments = prune_arguments(folder, tmp_path / "out", model=str(folder / name))
    command = [sys.executable, "-m", "neuronal_ray.prune", *arguments]
    finished = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=Path(neuronal_ray.__file__).parents[1]
    )
    assert finished.returncode == 2, finished
    lines = [line for line in finished.stderr.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, finished.stderr
    assert lines[0].startswith("neuronal-ray prune: error: --model: ")
    assert not list(tmp_path.iterdir())
