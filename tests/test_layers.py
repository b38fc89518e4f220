"""Do imports point down, do the heavy libraries stay where they belong, and does importing do nothing?"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import neuronal_ray

PACKAGE = Path(neuronal_ray.__file__).parent

ORDER = (
    ("cli",),
    ("core",),
    ("data",),
    ("models", "algorithms"),
    ("workers",),
    ("evaluate", "report"),
    ("prune",),
    ("sweep", "export"),
    ("benchmark",),
)
"""The packages: each imports from those in rows above its own, and from itself."""

HOMES = {
    "ray": "neuronal_ray.workers.pools.ray",
    "transformers": "neuronal_ray.models",
    "lm_eval": "neuronal_ray.evaluate",
    "matplotlib": "neuronal_ray.report",
}
"""The only package that imports a library."""

MOST_LINES = 300

JUNK_DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def row_of(module: str) -> int:
    """The row of the module's package; of the package's own `__init__` the first, of its `__main__` the last."""
    _, _, inner = module.partition(".")
    if not inner:
        return -1
    if inner == "__main__":
        return len(ORDER)
    (row,) = [row for row, packages in enumerate(ORDER) if inner.split(".")[0] in packages]
    return row


def imports(module: str) -> Iterator[str]:
    """Full names of what a module imports, inside functions and `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_its_package_and_from_rows_above(module: str) -> None:
    upward = [
        imported
        for imported in imports(module)
        if imported.split(".")[0] == "neuronal_ray"
        and package_of(imported) != package_of(module)
        and row_of(imported) >= row_of(module)
    ]
    assert not upward, f"{module} (row {row_of(module)}) imports {upward}"


def test_modules_do_not_import_in_a_circle() -> None:
    graph = {module: set(imports(module)) & MODULES.keys() - {module} for module in MODULES}
    while leaves := [module for module in graph if not graph[module]]:
        for module in leaves:
            del graph[module]
        graph = {module: imported - set(leaves) for module, imported in graph.items()}
    assert not graph, f"in circles, or above them: {sorted(graph)}"


def test_the_packages_are_those_of_the_order() -> None:
    found = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert found == {package for row in ORDER for package in row}


@pytest.mark.parametrize("path", [*MODULES.values(), *PACKAGE.rglob("*.c")], ids=lambda path: path.stem)
def test_a_file_is_short_enough_to_be_read(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines < MOST_LINES, f"{path.relative_to(PACKAGE)} has {lines} lines"


@pytest.mark.parametrize(("library", "home"), HOMES.items())
def test_a_library_is_imported_at_home_only(library: str, home: str) -> None:
    users = {module for module in MODULES for imported in imports(module) if imported.split(".")[0] == library}
    assert all(module.startswith(home) for module in users), f"{library} is imported by {sorted(users)}"


def test_there_is_no_junk_drawer() -> None:
    assert not [module for module in MODULES if set(module.split(".")) & JUNK_DRAWERS]


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules in `sys.modules` at the end of `python ARGUMENTS`."""
    report = "import atexit, json, sys; atexit.register(lambda: print('\\n' + json.dumps(sorted(sys.modules))))"
    code = f"import runpy, sys; {report}; sys.argv = {list(arguments)!r}; {{}}"
    action = (
        f"runpy.run_module({arguments[0]!r}, run_name='__main__')" if len(arguments) > 1 else f"import {arguments[0]}"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code.format(action)], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120
    )
    assert finished.returncode == 0, finished.stderr
    return {module.split(".")[0] for module in json.loads(finished.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "arguments",
    [
        ("neuronal_ray",),
        ("neuronal_ray.prune", "--help"),
        ("neuronal_ray.evaluate", "--help"),
        ("neuronal_ray.report", "--help"),
        ("neuronal_ray.export", "--help"),
        ("neuronal_ray", "prune", "--help"),
    ],
    ids=" ".join,
)
def test_help_answers_without_the_heavy_libraries(arguments: tuple[str, ...]) -> None:
    loaded = loaded_by(*arguments)
    assert "neuronal_ray" in loaded
    heavy = {"torch", "transformers", "ray", "datasets", "lm_eval", "matplotlib", "numpy", "pyarrow"}
    assert not loaded & heavy


@pytest.mark.parametrize("command", ["prune", "evaluate", "report", "export", "benchmark"])
def test_every_command_of_the_script_is_a_module_with_main(command: str) -> None:
    functions = [
        node.name
        for node in ast.parse(MODULES[f"neuronal_ray.{command}.__main__"].read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert "main" in functions
