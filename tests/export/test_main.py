"""Does `neuronal-ray export` write every format, and refuse bad input in one line with exit code 2?"""

import json
import logging
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import prune_arguments, write_model, write_texts
from transformers import AutoModelForCausalLM

import neuronal_ray
from neuronal_ray.cli.options import options_of
from neuronal_ray.cli.read_headers import read_header
from neuronal_ray.export.__main__ import main as export_main
from neuronal_ray.export.config import ExportConfig
from neuronal_ray.export.formats import WRITERS
from neuronal_ray.prune.__main__ import main as prune

PRUNABLE = 3 * (32 * 96 + 3 * 32 * 48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` in bfloat16, and `pruned`, as prune writes it."""
    folder = tmp_path_factory.mktemp("export")
    write_model(folder / "model", dtype=torch.bfloat16)
    write_texts(folder)
    changes = {"evaluate": "none", "allocation": "uniform", "block_lambdas": None, "row_lambdas": None}
    assert prune(prune_arguments(folder, folder / "pruned", **changes)) == 0
    return folder


def export(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What a run that ends well prints."""
    code = export_main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one line on stderr of a run that is refused."""
    assert export_main([str(argument) for argument in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("neuronal-ray export: error: ")


def test_a_dense_directory_is_checked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    printed = export(capsys, "--model", folder / "pruned")
    pruned = json.loads((folder / "pruned" / "pruning.json").read_text())["sparsity"]["pruned"]
    assert f"{pruned:,} of {PRUNABLE:,} weights are zero: {pruned / PRUNABLE:.4%}" in printed
    tensors = load_file(folder / "pruned" / "model.safetensors")
    for line in printed.splitlines()[:-1]:
        name, *_, share = line.split()
        assert share == f"{(tensors[name] == 0).float().mean():.4%}"
    assert len(printed.splitlines()) == 1 + 3 * 7
    assert sorted(folder.iterdir()) == before


def test_a_dense_directory_is_copied(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(capsys, "--model", folder / "pruned", "--output", tmp_path / "copy")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (folder / "pruned" / name).read_bytes()


def test_packed_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    printed = export(capsys, "--model", folder / "pruned", "--format", "packed", "--output", out)
    assert "21 tensors packed" in printed
    assert f"files: {(out / 'packed.safetensors').stat().st_size:,} bytes" in printed
    assert (out / "tokenizer.json").is_file()
    assert "is a packed model; neuronal_ray.load_packed reads it" in refused(capsys, "--model", out)
    found, expected = neuronal_ray.load_packed(out), AutoModelForCausalLM.from_pretrained(folder / "pruned")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name].view(torch.int16), tensor.view(torch.int16)), name
    found.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(folder / "pruned" / "model.safetensors").items():
        assert torch.equal(again[name].view(torch.int16), tensor.view(torch.int16)), name


def test_masks_and_their_application(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks, out = tmp_path / "masks.safetensors", tmp_path / "out"
    printed = export(capsys, "--model", folder / "pruned", "--format", "masks", "--output", masks)
    assert f"masks of 21 tensors, {masks.stat().st_size:,} bytes" in printed
    printed = export(capsys, "--model", folder / "model", "--masks", masks, "--output", out)
    assert "weights are zero" in printed
    zeros = record_of(folder / "pruned")["sparsity"]["pruned"]
    found = record_of(out)
    assert found["export"] == {"format": "dense", "zeros": zeros, "weights": PRUNABLE}
    assert found["sparsity"] == {"achieved": zeros / PRUNABLE, "pruned": zeros, "prunable": PRUNABLE}
    assert "evaluation" not in found, "the evaluation was of another model"
    expected = load_file(folder / "pruned" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out / "model.safetensors").items())


def record_of(path: Path) -> dict[str, Any]:
    """pruning.json of a directory, or the record in a file of masks."""
    text = read_header(path).metadata["record"] if path.is_file() else (path / "pruning.json").read_text()
    return json.loads(text)


@pytest.mark.parametrize("form", ["dense", "packed", "masks"])
def test_an_export_keeps_a_true_record(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    export(capsys, "--model", folder / "pruned", "--format", form, "--output", out)
    known = record_of(folder / "pruned")
    counted = {"format": form, "zeros": known["sparsity"]["pruned"], "weights": PRUNABLE}
    assert record_of(out) == known | {"export": counted}


@pytest.mark.parametrize("form", ["packed", "masks", "dense"])
def test_an_export_of_a_changed_model_records_what_it_counted(
    form: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    changed, out = tmp_path / "changed", tmp_path / "out.safetensors"
    shutil.copytree(folder / "pruned", changed)
    tensors = load_file(changed / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    was, tensors[name][:5] = int((tensors[name] == 0).sum()), 0
    tensors[name][7] = -0.0
    zeros = record_of(changed)["sparsity"]["pruned"] - was + int((tensors[name] == 0).sum())
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    if form == "dense":  # a check
        line = refused(capsys, "--model", changed, "--output", out)
        assert f"the tensors have {zeros:,} of {PRUNABLE:,}" in line, line
        return
    with caplog.at_level(logging.WARNING):
        export(capsys, "--model", changed, "--format", form, "--output", out)
    assert f"the tensors have {zeros:,} of {PRUNABLE:,}; the export records these alone" in caplog.text
    found = record_of(out)
    assert found["sparsity"] == {"achieved": zeros / PRUNABLE, "pruned": zeros, "prunable": PRUNABLE}
    assert found["export"] == {"format": form, "zeros": zeros, "weights": PRUNABLE}
    assert not found.keys() & {"evaluation", "search", "method"}, found.keys()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[]", "object"),
        ("{}", "sparsity is missing"),
        ('{"sparsity": {"pruned": "many", "prunable": 3}}', "sparsity.pruned: 'many'"),
    ],
)
def test_a_damaged_record_is_refused(
    content: str, expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "pruned", tmp_path / "model")
    (tmp_path / "model" / "pruning.json").write_text(content)
    for form in ("dense", "packed", "masks"):
        line = refused(capsys, "--model", tmp_path / "model", "--format", form, "--output", tmp_path / "o.safetensors")
        assert line.startswith("--model: "), line
        assert "pruning.json" in line, line
        assert expected in line, line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--format", "packed"], "--output: missing"),
        (["--masks", "m.safetensors"], "--output: missing"),
        (["--format", "masks", "--output", "OUT"], "is not a .safetensors file"),
        (["--format", "packed", "--masks", "m.safetensors", "--output", "OUT"], "--masks: applied to a dense copy"),
        (["--masks", "OUT/m.safetensors", "--output", "OUT/out"], "does not exist, expected a file"),
        (["--output", "HERE"], "exists already"),
        (["--format", "masks", "--output", "OUT/none/m.safetensors"], "--output: no directory"),
    ],
)
def test_options_that_cannot_work_are_refused(
    arguments: list[str], expected: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [word.replace("HERE", str(tmp_path)).replace("OUT", str(out)) for word in arguments]
    assert expected in refused(capsys, "--model", folder / "pruned", *words)
    assert not list(tmp_path.iterdir())


def test_models_that_are_none_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model: no directory" in refused(capsys, "--model", tmp_path / "nowhere")
    shutil.copytree(folder / "pruned", tmp_path / "damaged")
    file = tmp_path / "damaged" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    for format_ in ("dense", "packed"):
        line = refused(capsys, "--model", tmp_path / "damaged", "--format", format_, "--output", tmp_path / "out")
        assert line.startswith("--model: ")
        assert "truncated" in line
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_every_format_has_a_writer() -> None:
    assert tuple(WRITERS) == options_of(ExportConfig)["format"].choices


def test_an_unknown_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(["--model", "builtin", "--format", "zip"]) == 2
    assert capsys.readouterr().err.startswith("neuronal-ray export: error: --format: 'zip' is not one of: dense, ")


@pytest.mark.skipif(find_spec("onnx") is not None and find_spec("onnxscript") is not None, reason="ONNX is here")
def test_onnx_says_what_to_install(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--model", folder / "pruned", "--format", "onnx", "--output", tmp_path / "graph")
    assert "--format onnx: needs" in line
    assert "neuronal_ray[inference]" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("onnxscript") is None or find_spec("onnx") is None, reason="no onnx, onnxscript")
def test_onnx_is_written_beside_the_tokenizer(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = export(capsys, "--model", folder / "pruned", "--format", "onnx", "--output", tmp_path / "graph")
    assert "model.onnx" in printed
    assert {"model.onnx", "config.json"} <= {file.name for file in (tmp_path / "graph").iterdir()}
