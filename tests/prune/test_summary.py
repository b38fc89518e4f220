"""The table of a run names the mode where it has an effect, and counts candidates from 1."""

import json
import re
from pathlib import Path

import pytest
from tiny import prune_arguments, write_model, write_texts

from neuronal_ray.prune.__main__ import main


@pytest.mark.parametrize(
    ("allocation", "mode", "named"),
    [
        ("uniform", "best", False),
        ("uniform", "paper", False),
        ("owl", "paper", False),
        ("uniform", "authors", True),
        ("neuronal", "paper", True),
    ],
)
def test_the_mode_is_named_where_it_has_an_effect(
    allocation: str, mode: str, named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    assert main(prune_arguments(tmp_path, tmp_path / "out", allocation=allocation, mode=mode)) == 0
    printed = capsys.readouterr().out
    assert (f"({mode} mode)" in printed) is named, printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert (f"mode {mode}</small>" in page) is named


def test_the_commit_of_a_model_of_the_hub_is_recorded(tmp_path: Path) -> None:
    model = tmp_path / "models--owner--name" / "snapshots" / "0123456789"
    write_model(model)
    write_texts(tmp_path)
    arguments = prune_arguments(tmp_path, tmp_path / "out", allocation="uniform", evaluate="none", model=str(model))
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["revision"] == "0123456789"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"allocation": "adaptive", "mode": "best", "search_budget": "5"}, r"adaptive step: candidate [1-9] of \d, "),
        ({"allocation": "atp", "set": "allocation.max_candidates=3"}, r"slope step: slope 0\.\d+ of 3 candidates, "),
        ({"allocation": "neuronal"}, r"block step: lambda 0\.\d+ of 2 candidates, "),
    ],
)
def test_candidates_are_named_by_what_they_vary_or_numbered_from_1(
    changes: dict[str, str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    assert main(prune_arguments(tmp_path, tmp_path / "out", **changes)) == 0
    output = capsys.readouterr()
    assert re.search(line, output.out), output.out
    assert "candidate 0" not in output.out + output.err
    steps = json.loads((tmp_path / "out" / "pruning.json").read_text())["search"]
    page = (tmp_path / "out" / "report.html").read_text()
    for step in steps.values():
        if step["noun"] == "candidate":
            numbers = [candidate["lambda"] for candidate in step["candidates"]]
            assert numbers == list(range(1, 1 + len(numbers)))
            assert f"candidate {step['selected']:g} of {len(numbers)}" in page
