"""`python -m neuronal_ray.benchmark MEASUREMENT`: choose a measurement and run it."""

import sys
from collections.abc import Sequence
from importlib import import_module

from neuronal_ray.cli.errors import BadInput, did_you_mean, shown
from neuronal_ray.cli.exit_codes import exit_code

_DEFAULT = "search"

MEASUREMENTS = {
    "search": ("neuronal_ray.benchmark.search", "the search by stage, its lower bounds, a literal search (default)"),
    "kernels": (
        "neuronal_ray.benchmark.kernels",
        "each kernel compared with its reference and with a copy of its bytes",
    ),
    "job": ("neuronal_ray.benchmark.job", "a whole run: statistics, search, three perplexities, files"),
    "memory": (
        "neuronal_ray.benchmark.memory",
        "memory with offloaded blocks: the planner's formula and what is measured",
    ),
    "table": ("neuronal_ray.benchmark.table", "Markdown tables of the files that search and job wrote"),
    "methods": ("neuronal_ray.benchmark.methods", "allocations, refinements and solvers compared with the dense pass"),
    "cluster": ("neuronal_ray.benchmark.cluster", "the overhead of Ray, the gain of replicas and shards"),
    "inference": ("neuronal_ray.benchmark.inference", "dense and sparse models in every runtime that is installed"),
    "export": ("neuronal_ray.benchmark.export", "packing and loading compared with plain reading and writing"),
    "scaling": ("neuronal_ray.benchmark.scaling", "predicted search times on larger machines"),
}
"""By name: a module with `main(argv)`, which raises BadInput for bad input, and what it measures."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the measurement; return 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray benchmark", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    first = argv[0] if argv else ""
    if first in ("-h", "--help"):
        width = max(map(len, MEASUREMENTS))
        print("usage: neuronal-ray benchmark [MEASUREMENT] [options]\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in MEASUREMENTS.items()))
        print("\nOptions of a measurement: neuronal-ray benchmark MEASUREMENT --help")
        return
    named = bool(first) and not first.startswith("-")
    name = first if named else _DEFAULT
    if name not in MEASUREMENTS:
        near = did_you_mean(name, MEASUREMENTS)
        raise BadInput(f"unknown measurement {shown(name)}, expected one of: {', '.join(MEASUREMENTS)}{near}")
    try:
        module = import_module(MEASUREMENTS[name][0])
    except ModuleNotFoundError as error:
        raise BadInput(f"{name}: {error.name} is not installed") from error
    module.main(argv[1:] if named else argv)


if __name__ == "__main__":
    sys.exit(main())
