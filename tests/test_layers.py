"""Do imports point down, do the heavy libraries stay where they belong, and does importing do nothing?"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import neuronal_ray

PACKAGE = Path(neuronal_ray.__file__).parent

LAYERS = """
neuronal_ray
neuronal_ray.algorithms.registry neuronal_ray.cli.options
neuronal_ray.cli.config
neuronal_ray.core.kernels
neuronal_ray.core.kernels.triton_cut neuronal_ray.core.kernels.triton_norm neuronal_ray.core.kernels.triton_rotary
neuronal_ray.core.kernels.triton_gate
neuronal_ray.core.kernels.build neuronal_ray.core.kernels.dispatch
neuronal_ray.core.kernels.cut neuronal_ray.core.kernels.ranking neuronal_ray.core.kernels.squares neuronal_ray.core.kernels.memory
neuronal_ray.core.kernels.packed neuronal_ray.core.kernels.norm neuronal_ray.core.kernels.rotary neuronal_ray.core.kernels.gate
neuronal_ray.core
neuronal_ray.core.masks neuronal_ray.core.stats
neuronal_ray.core.layout neuronal_ray.core.operators neuronal_ray.core.spectrum neuronal_ray.core.spread
neuronal_ray.core.alignment neuronal_ray.core.plan
neuronal_ray.core.packing neuronal_ray.core.divergence neuronal_ray.core.levels
neuronal_ray.core.pattern neuronal_ray.core.trim_rows neuronal_ray.core.directions
neuronal_ray.benchmark.runtimes
neuronal_ray.algorithms.methods
neuronal_ray.algorithms.methods.*
neuronal_ray.algorithms.refinements
neuronal_ray.algorithms.refinements.*
neuronal_ray.algorithms.linear_pruner
neuronal_ray.workers.solved_levels
neuronal_ray.models
neuronal_ray.models.unsupported neuronal_ray.models.tensor_files
neuronal_ray.models.experts neuronal_ray.models.fingerprints
neuronal_ray.models.offload neuronal_ray.models.fused_gates
neuronal_ray.models.blocks
neuronal_ray.models.row_layouts neuronal_ray.models.routing neuronal_ray.models.fused_modules
neuronal_ray.models.checkpoint neuronal_ray.models.wiring neuronal_ray.models.formats.packed_linear
neuronal_ray.models.output_files neuronal_ray.models.synthetic
neuronal_ray.models.tensor_copies neuronal_ray.models.formats.packed
neuronal_ray.models.formats.packed_loading neuronal_ray.models.formats.masks neuronal_ray.models.formats.audit
neuronal_ray.models.formats.semi_structured
neuronal_ray.models.generation neuronal_ray.models.formats.onnx_graph
neuronal_ray.benchmark.runtimes.graph neuronal_ray.benchmark.runtimes.measured neuronal_ray.benchmark.runtimes.child
neuronal_ray.benchmark.runtimes.*
neuronal_ray.models.train_builtin
neuronal_ray.data
neuronal_ray.data.text
neuronal_ray.data.tokens
neuronal_ray.data.calibration neuronal_ray.data.windows
neuronal_ray.workers.stopwatch neuronal_ray.cli.progress neuronal_ray.benchmark.live_bytes neuronal_ray.workers.background
neuronal_ray.workers.comparison neuronal_ray.workers.replica neuronal_ray.workers.distributions
neuronal_ray.workers.search_text neuronal_ray.workers.masked_weights
neuronal_ray.workers.thread_lanes
neuronal_ray.workers.spec
neuronal_ray.workers.shard
neuronal_ray.workers.block_work
neuronal_ray.workers.tasks.candidates
neuronal_ray.workers.tasks.solver_candidates neuronal_ray.workers.tasks.probes
neuronal_ray.workers.tasks.final_model
neuronal_ray.workers.worker
neuronal_ray.workers.footprint neuronal_ray.workers.pools.protocol
neuronal_ray.core.problem
neuronal_ray.core.lambda_search
neuronal_ray.core.problem.*
neuronal_ray.workers.pools.ray
neuronal_ray.workers.pools.ray.tensors neuronal_ray.workers.pools.ray.devices
neuronal_ray.workers.pools.ray.costs
neuronal_ray.workers.pools.ray.actor
neuronal_ray.workers.pools.ray.pool
neuronal_ray.evaluate
neuronal_ray.evaluate.scores neuronal_ray.evaluate.local_rows neuronal_ray.evaluate.benchmark_names
neuronal_ray.evaluate.perplexity neuronal_ray.evaluate.benchmarks
neuronal_ray.evaluate.measure
neuronal_ray.prune.journal
neuronal_ray.prune.search neuronal_ray.prune.compose
neuronal_ray.prune.files neuronal_ray.workers.pools.launch
neuronal_ray.prune.session
neuronal_ray.prune.pipeline
neuronal_ray.sweep.config neuronal_ray.prune.dry_run
neuronal_ray.sweep.files
neuronal_ray.sweep.pipeline
neuronal_ray.sweep.dry_run
neuronal_ray.report.inputs neuronal_ray.report.style neuronal_ray.report.study_tables
neuronal_ray.report.figures
neuronal_ray.report.study_page
neuronal_ray.cli.exit_codes
neuronal_ray.report neuronal_ray.report.growth
neuronal_ray.benchmark.record neuronal_ray.benchmark.device neuronal_ray.benchmark.shapes
neuronal_ray.benchmark.literal neuronal_ray.benchmark.stages neuronal_ray.benchmark.table
neuronal_ray.benchmark.timed
neuronal_ray.prune neuronal_ray.evaluate neuronal_ray.sweep neuronal_ray.export
neuronal_ray.benchmark.search neuronal_ray.benchmark.job neuronal_ray.benchmark.growth neuronal_ray.benchmark.memory
neuronal_ray.benchmark.methods neuronal_ray.benchmark.sweep neuronal_ray.benchmark.kernels
neuronal_ray.benchmark.cluster neuronal_ray.benchmark.scaling
neuronal_ray.benchmark.export
neuronal_ray.benchmark.inference
neuronal_ray.benchmark
neuronal_ray.__main__
"""
"""One row per layer: a module imports from rows above its own only. A star stands for the plug-ins of a folder."""

ROWS = [row.split() for row in LAYERS.strip().splitlines()]

HOMES = {
    "ray": "neuronal_ray.workers.pools.ray",
    "transformers": "neuronal_ray.models",
    "lm_eval": "neuronal_ray.evaluate",
    "matplotlib": "neuronal_ray.report",
}
"""The only part of the package, by the start of its name, that imports a library."""

JUNK_DRAWERS = {"utils", "util", "helpers", "helper", "common", "misc"}


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def row_of(module: str) -> int:
    """The row that names the module, or else the row whose star it falls under."""
    for row in range(len(ROWS)):
        if module in ROWS[row]:
            return row
    starred = [row for row in range(len(ROWS)) if any("*" in name and fnmatch(module, name) for name in ROWS[row])]
    assert starred, f"{module} has no place in LAYERS"
    return starred[0]


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


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_from_rows_above_its_own(module: str) -> None:
    upward = [
        imported
        for imported in imports(module)
        if imported.split(".")[0] == "neuronal_ray" and row_of(imported) >= row_of(module)
    ]
    assert not upward, f"{module} (row {row_of(module)}) imports {upward}"


def test_every_name_in_the_list_is_a_module() -> None:
    named = [name for row in ROWS for name in row if "*" not in name]
    assert len(named) == len(set(named))
    assert set(named) <= set(MODULES), set(named) - set(MODULES)


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
        for node in ast.parse(MODULES[f"neuronal_ray.{command}"].read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert "main" in functions
