"""Do git and the upload of a Ray job leave out what our own commands write, and nothing of the package?"""

import subprocess
from pathlib import Path

import pytest
from ray._private.thirdparty.pathspec import PathSpec  # what Ray reads .rayignore with

import neuronal_ray

REPOSITORY = Path(neuronal_ray.__file__).parents[1]
WRITTEN = (
    "pruned/llama-7b-70/model.safetensors",
    "pruned-packed/model.safetensors",
    "packed/model.safetensors",
    "masks.safetensors",
    "runs/language/results/cells.parquet",
    "model.onnx",
    ".out.partial-17/model.safetensors",
    ".out.replaced-17/model.safetensors",
    ".out.journal/0123/question.json",
    "somewhere/.out.journal/0123/question.json",
)


@pytest.mark.parametrize("path", WRITTEN)
def test_what_is_written_is_left_out(path: str) -> None:
    assert ray_ignored(path), ".rayignore"
    asked = subprocess.run(["git", "check-ignore", "--quiet", path], cwd=REPOSITORY, check=False)
    assert asked.returncode == 0, ".gitignore"


def test_the_package_is_uploaded() -> None:
    files = [path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "neuronal_ray").rglob("*.py")]
    assert files
    assert [path for path in files if ray_ignored(path)] == []
    assert not ray_ignored("jobs/demo.toml")


def ray_ignored(path: str) -> bool:
    lines = (REPOSITORY / ".rayignore").read_text().splitlines()
    return bool(PathSpec.from_lines("gitwildmatch", lines).match_file(path))
