"""A model that is sparse already: its zeros stay, count as removed, and are said; a lower target is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.prune.__main__ import main

Run = Callable[..., dict]


def linears(path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if "_proj" in name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which rows, linears and blocks have lost unequal parts, 70 % in all."""
    folder = tmp_path_factory.mktemp("zeros")
    write_model(folder / "dense")
    write_texts(folder)
    words = prune_arguments(folder, folder / "model", sparsity="0.7", allocation="adaptive", mode="best")
    words[words.index("--model") + 1] = str(folder / "dense")
    assert main([*words, "--search-budget", "12"]) == 0
    return folder


@pytest.fixture
def again(folder: Path, tmp_path: Path) -> Run:
    def run(**changes: str | None) -> dict:
        assert main(prune_arguments(folder, tmp_path / "again", **changes)) == 0
        before, after = linears(folder / "model"), linears(tmp_path / "again")
        numbers = sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in before)
        zeros = sum(int((tensor == 0).sum()) for tensor in after.values())
        summary = json.loads((tmp_path / "again" / "pruning.json").read_text())
        assert summary["sparsity"]["pruned"] == zeros
        return summary["sparsity"] | {"numbers again": numbers, "after": after, "before": before}

    return run


@pytest.mark.parametrize("refinement", ["none", "dsnot"])
@pytest.mark.parametrize("allocation", ["uniform", "owl", "neuronal", "besa", "adaptive"])
def test_masks_meet_a_higher_target_to_the_weight(allocation: str, refinement: str, again: Run) -> None:
    quick = {"adaptive": {"search_budget": "12", "mode": "best"}, "besa": {"set": "allocation.steps=2"}}
    found = again(sparsity="0.75", allocation=allocation, refinement=refinement, **quick.get(allocation, {}))
    assert found["numbers again"] == 0
    assert found["pruned"] == round(0.75 * found["prunable"])


@pytest.mark.parametrize("method", ["magnitude", "multiflow", "sparsegpt", "alps"])
@pytest.mark.parametrize("more", [{}, {"row_step": "trim"}, {"mode": "authors"}])
def test_every_method_meets_a_higher_target_to_the_weight(method: str, more: dict[str, str], again: Run) -> None:
    solves, authors = method in ("sparsegpt", "alps"), "mode" in more
    if (solves and "row_step" in more) or (method == "alps" and authors):
        pytest.skip("does not go together")
    found = again(sparsity="0.75", method=method, allocation="uniform", **more)
    assert found["numbers again"] == 0, f"of {found['input_zeros']}"
    if not authors:
        assert found["pruned"] == round(0.75 * found["prunable"])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_a_search_over_solved_levels_keeps_zeros_too(method: str, again: Run) -> None:
    found = again(sparsity="0.8", method=method, allocation="adaptive", mode="best", search_budget="12")
    assert found["numbers again"] == 0
    assert found["pruned"] == round(0.8 * found["prunable"])


@pytest.mark.parametrize("more", [{}, {"refinement": "dsnot", "refined_parts": "all"}])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_a_group_keeps_its_zeros_where_they_are_more_than_the_pattern_s(
    method: str, more: dict[str, str], again: Run
) -> None:
    if more and method == "alps":
        pytest.skip("does not go together")
    found = again(sparsity=None, method=method, pattern="2:4", **more)
    assert found["numbers again"] == 0, f"of {found['input_zeros']}"
    for name, after in found["after"].items():
        zeros, before = ((weight == 0).view(-1, 4).sum(dim=1) for weight in (after, found["before"][name]))
        assert torch.equal(zeros, before.clamp_min(2)), name


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_a_mixed_pattern_keeps_zeros(method: str, again: Run) -> None:
    found = again(sparsity="0.75", method=method, pattern="n:8", allocation="uniform")
    assert found["numbers again"] == 0
    assert found["achieved"] >= 0.75


@pytest.mark.parametrize("dry_run", [None, ""])
@pytest.mark.parametrize("more", [{"sparsity": "0.5"}, {"sparsity": None, "pattern": "n:8"}])
def test_a_target_below_the_input_s_is_refused_with_both_numbers(
    more: dict[str, str | None], dry_run: str | None, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    sparser = {"model": str(folder / "model")}
    if more["sparsity"] is None:  # the default is 0.7
        write_texts(tmp_path)
        assert main(prune_arguments(folder, tmp_path / "sparser", sparsity="0.9")) == 0
        sparser = {"model": str(tmp_path / "sparser")}
    before = sorted(tmp_path.iterdir())
    arguments = prune_arguments(folder, tmp_path / "out", **sparser, **more, dry_run=dry_run)
    assert main(arguments if dry_run is not None else [word for word in arguments if word != "--dry-run"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "--sparsity" in line]
    assert "0.5 is below the input's, 0.7000" in line or "0.7 is below the input's, 0.9000" in line, line
    assert "--revive" in line
    assert sorted(tmp_path.iterdir()) == before


def test_with_revive_a_solver_gives_zeros_values_and_a_lower_target_is_accepted(again: Run) -> None:
    found = again(sparsity=None, method="sparsegpt", pattern="2:4", revive="")
    assert found["numbers again"] > 0
    assert found["input"] == pytest.approx(0.7, abs=1e-4)


def test_a_lower_target_is_accepted_with_revive(again: Run) -> None:
    found = again(sparsity="0.5", method="alps", allocation="uniform", revive="")
    assert found["target"] == 0.5


def test_revive_is_ignored_with_a_warning_where_nothing_is_solved(again: Run, caplog: pytest.LogCaptureFixture) -> None:
    found = again(sparsity="0.5", method="wanda", allocation="uniform", revive="")
    assert found["achieved"] >= found["input"]
    assert any("--revive: ignored" in message for message in caplog.messages), caplog.messages


def test_the_input_s_sparsity_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = prune_arguments(folder, tmp_path / "out", sparsity="0.8")
    assert main([*arguments, "--dry-run"]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("input"))
    sparsity = json.loads((folder / "model" / "pruning.json").read_text())["sparsity"]
    assert (
        f"{sparsity['pruned']:,} of {sparsity['prunable']:,} weights are zero already (70.00%); they stay zero" in said
    )
    assert sparsity["input_zeros"] == sparsity["input"] == 0
    assert main(arguments) == 0
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())["sparsity"]
    assert found["input_zeros"] == sparsity["pruned"]
    assert found["input"] == sparsity["achieved"]


def test_a_few_accidental_zeros_do_not_refuse_a_dense_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][3, :3] = 0
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    assert main(prune_arguments(tmp_path, tmp_path / "out", sparsity="0", allocation="uniform")) == 0
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["sparsity"]["pruned"] == 3
