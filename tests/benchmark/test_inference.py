"""Does `benchmark inference` measure two models side by side, and refuse what it cannot measure in one line?"""

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny import write_model

import neuronal_ray.benchmark.__main__
from neuronal_ray.benchmark.runtimes import RUNTIMES, missing

QUICK = ["--rounds", "2", "--prompt", "6", "--tokens", "3", "--threads", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dense, sparse (half of its linears' weights are zero) and other, which has another shape."""
    folder = tmp_path_factory.mktemp("inference")
    write_model(folder / "dense")
    write_model(folder / "sparse")
    write_model(folder / "other", hidden_size=40)
    tensors = load_file(folder / "sparse" / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            weight[:, ::2] = 0
    save_file(tensors, folder / "sparse" / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(models: Path, *options: str, model: str = "sparse") -> int:
    command = ["inference", "--model", str(models / model), "--against", str(models / "dense"), *QUICK, *options]
    return neuronal_ray.benchmark.__main__.main(command)


def test_the_table_has_both_models_and_the_file_the_figures(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(models, "--runtimes", "eager,csr", "--batches", "1,2", "--output", str(tmp_path / "out.json")) == 0
    printed = capsys.readouterr().out
    assert "50.0 % zeros" in printed
    assert "prefill 2  decode 2" in printed
    assert printed.count("sparse / dense") == 2
    assert "csr: decode repeatable within" in printed
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["zeros"] == 0.5
    assert content["failed"] == {}
    assert [pair["runtime"] for pair in content["pairs"]] == ["eager", "csr"]
    for pair in content["pairs"]:
        for which in ("dense", "sparse"):
            found = pair[which]
            assert {len(rates) for rates in [*found["prefill"].values(), *found["decode"].values()]} == {2}
            assert min(found["decode"]["2"]) > 0
            assert found["peak_bytes"] >= found["held_bytes"] > found["disk_bytes"] > 0


def test_onnx_runtime_is_measured_where_it_is_installed(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if absent := missing(RUNTIMES["onnxruntime"]):
        pytest.skip(f"not installed: {', '.join(absent)}")
    assert run(models, "--runtimes", "onnxruntime", "--batches", "2") == 0
    assert "onnxruntime: decode repeatable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "model", "message"),
    [
        (("--runtimes", "eager,fast"), "sparse", "--runtimes: unknown 'fast'"),
        (("--runtimes", "deepsparse"), "sparse", "--deepsparse-python is not given|not installed: onnx"),
        (("--deepsparse-python", "/nowhere/python"), "sparse", "--deepsparse-python: no file /nowhere/python"),
        (("--rounds", "0"), "sparse", "--rounds: 0, expected at least 1"),
        (("--batches", "1,x"), "sparse", "--batches: '1,x' is not"),
        (("--output", "/nowhere/out.json"), "sparse", "--output: no directory /nowhere"),
        ((), "other", "--against: .* has other tensors"),
        ((), "absent", "--model: no directory"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    models: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], model: str, message: str
) -> None:
    assert run(models, *options, model=model) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
