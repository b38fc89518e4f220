"""`python -m neuronal_ray.benchmark PART`: which measurements are there, and which module makes each?"""

import sys
from collections.abc import Sequence
from importlib import import_module

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import exit_code

_DEFAULT = "search"

PARTS = {
    "search": ("neuronal_ray.benchmark.search", "where the search's time goes, its floors, a literal one (default)"),
    "kernels": ("neuronal_ray.benchmark.kernels", "cut, rank and squares beside their references and their bytes"),
    "job": ("neuronal_ray.benchmark.job", "a whole pruning: statistics, search, three perplexities, files"),
    "memory": ("neuronal_ray.benchmark.memory", "the planner's formula for visiting blocks beside what was measured"),
    "table": ("neuronal_ray.benchmark.table", "Markdown from files that searches and jobs wrote"),
    "methods": ("neuronal_ray.benchmark.methods", "allocations, refinements and solvers beside the dense pass"),
    "cluster": ("neuronal_ray.benchmark.cluster", "what Ray costs and replicas gain"),
    "inference": ("neuronal_ray.benchmark.inference", "what the zeros are worth in every runtime that is installed"),
    "export": ("neuronal_ray.benchmark.export", "packing and loading beside plain reading and writing"),
    "scaling": ("neuronal_ray.benchmark.scaling", "what is to be expected of larger machines"),
}
"""By name: a module with `main(argv)` and what it measures. Bad input is a ValueError."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for bad input."""
    return exit_code("neuronal-ray benchmark", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    first = argv[0] if argv else ""
    if first in ("-h", "--help"):
        width = max(map(len, PARTS))
        print("usage: neuronal-ray benchmark [PART] [options]\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in PARTS.items()))
        print("\nOptions of a part: neuronal-ray benchmark PART --help")
        return
    named = bool(first) and not first.startswith("-")
    part = first if named else _DEFAULT
    if part not in PARTS:
        raise BadInput(f"unknown part {part!r}, expected one of: {', '.join(PARTS)}")
    try:
        module = import_module(PARTS[part][0])
    except ModuleNotFoundError as error:
        raise BadInput(f"{part}: {error.name} is not installed") from error
    module.main(argv[1:] if named else argv)


if __name__ == "__main__":
    sys.exit(main())
