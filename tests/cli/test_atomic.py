"""Does every command refuse, at its start, outputs that it cannot or must not write, and write the others whole?"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.benchmark.__main__ import main as benchmark
from neuronal_ray.cli.atomic import has_format, staged
from neuronal_ray.evaluate.__main__ import main as evaluate
from neuronal_ray.export.__main__ import main as export
from neuronal_ray.prune.__main__ import main as prune
from neuronal_ray.report.__main__ import main as report
from neuronal_ray.sweep.__main__ import main as sweep

SWEEP = """
output = "{output}"
[options]
model = "{folder}/model"
calibration = "{folder}/calibration.txt"
evaluate = ["{folder}/evaluation.txt"]
"""
Command = Callable[..., int]
"""Runs a command on the folder's files, given the output, and more flags."""


def run_prune(folder: Path, output: Path, *flags: str) -> int:
    return prune(
        [
            *prune_arguments(
                folder, output, evaluate="none", allocation="uniform", block_lambdas=None, row_lambdas=None
            ),
            *flags,
        ]
    )


def run_evaluate(folder: Path, output: Path, *flags: str) -> int:
    words = ["--model", folder / "model", "--evaluate", folder / "evaluation.txt", "--sequence-length", "16"]
    return evaluate([str(word) for word in [*words, "--address", "none", "--threads", "1", "--output", output, *flags]])


def run_export(folder: Path, output: Path, *flags: str) -> int:
    return export(["--model", str(folder / "model"), "--output", str(output), *flags])


def run_masks(folder: Path, output: Path, *flags: str) -> int:
    return run_export(folder, output, "--format", "masks", *flags)


def run_benchmark(folder: Path, output: Path, *flags: str) -> int:
    words = ["inference", "--model", folder / "model", "--against", folder / "model", "--runtimes", "eager"]
    return benchmark([str(word) for word in [*words, "--rounds", "1", "--tokens", "2", "--output", output, *flags]])


def run_sweep(folder: Path, output: Path, *flags: str) -> int:
    (folder / "study.toml").write_text(SWEEP.format(folder=folder, output=output))
    return sweep([str(folder / "study.toml"), *flags])


DIRECTORIES: dict[str, Command] = {"prune": run_prune, "export": run_export, "sweep": run_sweep}
FILES: dict[str, Command] = {"evaluate": run_evaluate, "masks": run_masks, "benchmark": run_benchmark}
ALL = DIRECTORIES | FILES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with its texts; its weights are a link to `blob`, and `linked` is a link to it."""
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    (tmp_path / "blob").write_bytes((tmp_path / "model" / "model.safetensors").read_bytes())
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "blob")
    (tmp_path / "linked").symlink_to(tmp_path / "model")
    (tmp_path / "study.toml").write_text("")
    return tmp_path


def contents(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.name != "study.toml"]  # written by the test
    return {path: path.read_bytes() if path.is_file() else b"" for path in files}


def refused(command: Command, folder: Path, output: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line in which an output is refused; nothing has changed."""
    before = contents(folder)
    code = command(folder, output, *flags)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("[")]
    assert code == 2, lines
    assert len(lines) == 1, lines
    assert contents(folder) == before
    return lines[0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", ["model/out", "linked/out", "model/../model/sub/out", "blob"])
def test_a_model_that_is_read_is_never_written_to(
    name: str, place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, blob = folder / place, folder / "blob"
    if name == "masks":
        output = output.with_suffix(".safetensors")
        blob = blob.rename(folder / "blob.safetensors")
        (folder / "model" / "model.safetensors").unlink()
        (folder / "model" / "model.safetensors").symlink_to(blob)
    line = refused(ALL[name], folder, output, capsys, *([] if name == "sweep" else ["--overwrite"]))
    assert "the model that is read" in line or (name, place) == ("sweep", "blob"), line


@pytest.mark.parametrize("name", ["prune", "export"])
@pytest.mark.parametrize("place", ["model", "linked", "model/../linked", "."])
def test_a_model_that_is_read_is_never_replaced(
    name: str, place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "pruning.json").write_text("{}")
    (folder / "model" / "pruning.json").write_text("{}")
    assert "the model that is read" in refused(ALL[name], folder, folder / place, capsys, "--overwrite")


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file_is_replaced_with_overwrite_only(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "precious.safetensors"
    output.write_text("{}")
    line = refused(FILES[name], folder, output, capsys)
    assert f"--output: {output} exists already" in line
    assert "--overwrite" in line
    assert FILES[name](folder, output, "--overwrite") == 0, capsys.readouterr().err
    assert output.read_bytes() != b"{}"


@pytest.mark.parametrize("name", ["evaluate", "benchmark"])
def test_figures_are_written_again(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = folder / "figures.json"
    assert FILES[name](folder, output) == 0, capsys.readouterr().err
    assert json.loads(output.read_text())["format"] == f"neuronal_ray {name.replace('evaluate', 'evaluation')}"
    assert FILES[name](folder, output) == 0, capsys.readouterr().err
    other = {"evaluate": "benchmark", "benchmark": "evaluate"}[name]
    assert "exists already" in refused(FILES[other], folder, output, capsys)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("place", ["/proc/out", "text.txt/out", "dangling", "fifo", "n" * 250, "none/" + "n" * 300])
def test_outputs_that_cannot_be_made_are_refused(
    name: str, place: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "sweep" and place == "n" * 250:
        pytest.skip("the directory of a sweep has no temporary name, which would be too long")
    ending = ".safetensors" if name == "masks" else ""
    (folder / "text.txt").write_text("precious")
    (folder / f"dangling{ending}").symlink_to(folder / "nowhere")
    os.mkfifo(folder / f"fifo{ending}")
    flags = [] if name == "sweep" else ["--overwrite"]
    assert "--output" in refused(ALL[name], folder, folder / f"{place}{ending}", capsys, *flags)


def test_a_text_that_is_read_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "which is read" in refused(run_evaluate, folder, folder / "evaluation.txt", capsys, "--overwrite")


def test_a_report_replaces_reports_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_prune(folder, folder / "out") == 0
    assert report([str(folder / "out")]) == 0
    (folder / "out" / "report.html").write_text("notes of mine")
    assert report([str(folder / "out")]) == 2
    assert "report.html exists already" in capsys.readouterr().err
    assert report([str(folder / "out"), "--overwrite"]) == 0
    assert report([str(folder / "out")]) == 0


def test_only_an_object_with_the_key_has_a_format(tmp_path: Path) -> None:
    for text, expected in (('{"format": "a"}', True), ('{"format": "b"}', False), ("[]", False), ("{", False)):
        (tmp_path / "file").write_text(text)
        assert has_format(tmp_path / "file", "a") is expected, text
    assert not has_format(tmp_path, "a")


def test_what_appeared_in_the_meantime_is_kept(tmp_path: Path) -> None:
    def write() -> None:
        with staged(tmp_path / "out"):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "other").write_text("of another command")

    with pytest.raises(FileExistsError, match="appeared"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "other"]


def fail_half_way(target: Path) -> None:
    with staged(target) as staging:
        (staging / "half").write_text("written")
        raise RuntimeError("the run failed")


def test_a_staged_directory_takes_its_place_or_vanishes(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out"
    with pytest.raises(RuntimeError):
        fail_half_way(target)
    assert list(tmp_path.iterdir()) == []
    with staged(target) as staging:
        (staging / "file").write_text("first")
        assert not target.exists()
    with staged(target, overwrite=True) as staging:
        (staging / "file").write_text("second")
        assert (target / "file").read_text() == "first"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "second"
