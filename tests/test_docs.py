"""The example of docs/add-a-method.md does what the page says: it is extracted, put in place and run."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuronal_ray

PAGE = Path(__file__).parent.parent / "docs" / "add-a-method.md"
PLUG_IN = Path(neuronal_ray.__file__).parent / "methods" / "softwanda.py"
QUICK = ["--calibration-samples", "4", "--search-samples", "2", "--sequence-length", "32", "--evaluate", "none"]
QUICK += ["--block-lambdas", "0.1", "--row-lambdas", "0,0.1", "--address", "none"]


@pytest.fixture
def plug_in() -> Iterator[None]:
    """The page's Python block as the file that the page names."""
    assert not PLUG_IN.exists()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    try:
        PLUG_IN.write_text(code)
        yield
    finally:
        PLUG_IN.unlink()


def run(arguments: list[str], output: Path) -> bytes:
    """The weights that a prune in a process of its own writes."""
    command = [sys.executable, "-m", "neuronal_ray.prune", *arguments, *QUICK, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return (output / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("plug_in")
def test_the_page_adds_a_method(tmp_path: Path) -> None:
    (shell,) = re.findall(r"```\n(python -m neuronal_ray\.prune .*?)```", PAGE.read_text(), re.DOTALL)
    arguments = shlex.split(shell.replace("\\\n", " "))[3:]
    where = arguments.index("--output")
    del arguments[where : where + 2]
    run(arguments, tmp_path / "page")

    base = ["--model", "builtin", "--calibration", "builtin"]
    as_wanda = run([*base, "--method", "softwanda", "--set", "method.power=1"], tmp_path / "power1")
    assert as_wanda == run([*base, "--method", "wanda"], tmp_path / "wanda")
    as_magnitude = run([*base, "--method", "softwanda", "--set", "method.power=0"], tmp_path / "power0")
    assert as_magnitude == run([*base, "--method", "magnitude"], tmp_path / "magnitude")
