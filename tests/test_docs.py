"""Do the plug-ins of docs/plugins.md do what the page says, inside the repository, outside of it, and on Ray?"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import prune_arguments, write_model, write_texts

import neuronal_ray

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()
INSIDE = Path(neuronal_ray.__file__).parent / "algorithms" / "methods" / "softwanda.py"
REPOSITORY = Path(neuronal_ray.__file__).parents[1]
QUICK = ["--calibration-samples", "4", "--search-samples", "2", "--sequence-length", "32", "--evaluate", "none"]
QUICK += ["--block-lambdas", "0.1", "--row-lambdas", "0,0.1", "--search-budget", "8", "--address", "none"]


def code_of_page() -> dict[str, str]:
    """The page's Python blocks by the file that their first line names."""
    return dict(re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


def commands_of_page() -> list[list[str]]:
    """The arguments of the page's commands, but for their output."""
    found = []
    for shell in re.findall(r"```\n(python -m neuronal_ray\.prune .*?)```", PAGE, re.DOTALL):
        arguments = shlex.split(shell.replace("\\\n", " "))[3:]
        where = arguments.index("--output")
        found.append(arguments[:where] + arguments[where + 2 :])
    return found


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory outside the repository with the page's package in it."""
    folder = tmp_path_factory.mktemp("packages")
    for name, code in code_of_page().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return folder


@pytest.fixture
def inside() -> Iterator[None]:
    """The page's method as a file of the repository."""
    assert not INSIDE.exists()
    try:
        INSIDE.write_text(code_of_page()["my_plugins/softwanda.py"])
        yield
    finally:
        INSIDE.unlink()


IN_TURN = """
import json, sys
from neuronal_ray.prune.__main__ import main
sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
"""


def python(packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS`, with a directory of packages on the path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(packages), str(REPOSITORY)])}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=300
    )


def run(runs: dict[str, list[str]], folder: Path, packages: Path) -> dict[str, bytes]:
    """The weights that prunes write, by name; in a process of their own, as options are read at import."""
    words = [[*arguments, *QUICK, "--output", str(folder / name)] for name, arguments in runs.items()]
    done = python(packages, "-c", IN_TURN, json.dumps(words))
    assert done.returncode == 0, done.stderr
    return {name: (folder / name / "model.safetensors").read_bytes() for name in runs}


@pytest.mark.usefixtures("inside")
def test_the_method_of_the_page_is_the_same_inside_the_repository_and_outside(tmp_path: Path, packages: Path) -> None:
    base = ["--model", "builtin", "--calibration", "builtin", "--allocation", "uniform"]
    inside = [*base, "--method", "softwanda", "--set"]
    outside = [*base, "--method", "my_plugins.softwanda:METHOD", "--set"]
    runs = {
        "power1": [*inside, "method.power=1"],
        "power0": [*inside, "method.power=0"],
        "outside": [*outside, "method.power=0.5"],
        "inside": [*inside, "method.power=0.5"],
        "wanda": [*base, "--method", "wanda"],
        "magnitude": [*base, "--method", "magnitude"],
    }
    written = run(runs, tmp_path, packages)
    assert written["power1"] == written["wanda"]
    assert written["power0"] == written["magnitude"]
    assert written["inside"] == written["outside"]
    assert len({written[name] for name in ("wanda", "magnitude", "outside")}) == 3


def test_every_command_of_the_page_runs_and_its_plug_in_matters(tmp_path: Path, packages: Path) -> None:
    commands = commands_of_page()
    runs = {f"page{number}": command for number, command in enumerate(commands)}
    base = ["--model", "builtin", "--calibration", "builtin"]
    runs |= {"uniform": [*base, "--allocation", "uniform"], "owl": [*base, "--allocation", "owl"]}
    written = run(runs, tmp_path, packages)
    assert len(set(written.values())) == len(runs)
    summaries = [json.loads((tmp_path / name / "pruning.json").read_text()) for name in runs]
    named = [{summary[key] for key in ("method", "allocation", "row_step", "refinement")} for summary in summaries]
    for number, name in enumerate(("softwanda", "first_block", "energy:ROW_STEP", "one_swap")):
        assert f"my_plugins.{name}" in named[number]
    for summary in summaries:
        sparsity = summary["sparsity"]
        assert sparsity["pruned"] == round(0.7 * sparsity["prunable"])


def test_settings_of_a_plug_in_from_outside_are_checked_before_the_model_is_read(packages: Path) -> None:
    arguments = ["-m", "neuronal_ray.prune", "--model", "absent", "--dry-run", "--method", "my_plugins.softwanda"]
    for setting, message in {
        "method.power=2": "--set method.power: 2.0, expected a number from 0 to 1",
        "method.pwer=1": "--set method.pwer: unknown setting, expected method.power",
    }.items():
        done = python(packages, *arguments, "--set", setting)
        assert (done.returncode, done.stderr) == (2, f"neuronal-ray prune: error: {message}\n")


@pytest.mark.ray
def test_workers_on_ray_import_plug_ins_from_outside(tmp_path: Path, packages: Path) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    plug_ins = {
        "method": "my_plugins.softwanda",
        "allocation": "my_plugins.first_block",
        "row_step": "my_plugins.energy",
        "refinement": "my_plugins.one_swap",
    }
    written = []
    for address in ("none", "local"):
        arguments = prune_arguments(tmp_path, tmp_path / address, address=address, evaluate="none", **plug_ins)
        done = python(packages, "-m", "neuronal_ray.prune", *arguments)
        assert done.returncode == 0, done.stderr
        written.append((tmp_path / address / "model.safetensors").read_bytes())
    assert written[0] == written[1]
