"""A block or a linear that is left without weights is named in the terminal, in pruning.json and in the report."""

import json
from pathlib import Path

import pytest
import torch
from layouts import layout_of
from safetensors.torch import load_file
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.core.emptied import emptied, name_emptied
from neuronal_ray.core.plan import Plan
from neuronal_ray.prune.__main__ import main


@pytest.mark.parametrize("sparsity", ["0.6", "0.9"])
def test_a_run_names_what_it_emptied(sparsity: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    arguments = prune_arguments(
        tmp_path, tmp_path / "out", sparsity=sparsity, allocation="dlp", set="allocation.alpha=0.3"
    )
    assert main(arguments) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    lost = {int(name.split(".")[2]) for name, tensor in saved.items() if "_proj" in name and not tensor.any()}
    assert bool(lost) is (sparsity == "0.9"), lost
    expected = ", ".join(f"block {block} (all 7 linears)" for block in sorted(lost))
    summary, printed = json.loads((tmp_path / "out" / "pruning.json").read_text()), capsys.readouterr().out
    assert summary["sparsity"]["without_weights"] == expected
    assert (f"without any weight: {expected}" in printed) is bool(lost)
    assert (f"Without any weight: {expected}." in (tmp_path / "out" / "report.html").read_text()) is bool(lost)
    assert summary["sparsity"]["pruned"] == round(float(sparsity) * summary["sparsity"]["prunable"])


def test_single_linears_and_zeros_of_the_input_count() -> None:
    layout = layout_of([[(2, 3), (2, 3)], [(2, 3), (2, 3)]])
    names = [spec.linear for spec in layout]
    counts = [[3, 3], [3, 2], [3, 0], [0, 0]]
    zeros = [[0, 0], [0, 0], [0, 3], [3, 2]]
    plan = Plan({name: torch.tensor(row, dtype=torch.int32) for name, row in zip(names, counts, strict=True)})
    before = {name: torch.tensor(row, dtype=torch.int32) for name, row in zip(names, zeros, strict=True)}
    assert emptied(layout, plan, before) == [names[0], names[2]]
    assert name_emptied([names[2], names[0]], names) == "block 0 linear0, block 1 linear0"
    assert name_emptied(names, names) == "block 0 (all 2 linears), block 1 (all 2 linears)"
    assert name_emptied([], names) == ""
