"""The table of a run names the mode only where it has an effect."""

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
