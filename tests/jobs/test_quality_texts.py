"""The texts of the quality study: what is evaluated is not calibrated on, and windows are the first of their text."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny import LENGTH, write_model

from neuronal_ray.evaluate.inputs import read_windows
from neuronal_ray.evaluate.window_start import WindowStart
from neuronal_ray.models.checkpoint import open_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "jobs"))

import quality_texts


def test_a_held_out_share_is_not_calibrated_on() -> None:
    text = "\n".join(f"line {number} <end>" for number in range(100))
    kept, held = quality_texts.split_text(text, 0.25, drop=" <end>")
    assert kept + held == "\n".join(f"line {number}" for number in range(100))
    assert 20 <= len(held.split("\n")) - 1 <= 30


def test_the_first_windows_of_the_held_out_share_are_written(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"line {number}" for number in range(400)))
    words = ["--model", str(model), "--in-domain", str(tmp_path / "text.txt"), "--output", str(tmp_path / "texts")]
    words += ["--held-out", "0.25", "--windows", "3", "--sequence-length", str(LENGTH)]
    assert quality_texts.main(words) == 0
    written = load_file(tmp_path / "texts" / "in-domain.safetensors")["input_ids"]
    held_out = str(tmp_path / "texts" / "held-out.txt")
    start = WindowStart(used="papers")
    read = read_windows([held_out], open_checkpoint(model), length=LENGTH, trust_remote_code=False, start=start)
    assert torch.equal(written, read["held-out"].tokens[:3])
    assert "line 399" not in (tmp_path / "texts" / "calibration.txt").read_text()
