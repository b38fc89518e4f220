"""`neuronal-ray COMMAND`: the installed script; does the same as `python -m neuronal_ray.COMMAND`."""

import sys
from importlib import import_module

from neuronal_ray.cli.errors import did_you_mean, shown

_COMMANDS = {
    "prune": "prune a model to 60-80 % unstructured sparsity",
    "evaluate": "measure perplexity and benchmarks",
    "export": "check a pruned model, or write it packed, as masks or as an ONNX graph",
    "sweep": "prune and evaluate a grid of models, methods and sparsities, described by one file",
    "report": "write the report of a run again, or a report on sweeps",
    "benchmark": "measure searches, whole runs, kernels, memory and runtimes",
}


def main() -> int:
    """Run the command and return its exit code; 2 for an unknown command."""
    usage = "usage: neuronal-ray COMMAND [options]\n" + "".join(
        f"  {name:<10} {what}\n" for name, what in _COMMANDS.items()
    )
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage + "Options of a command: neuronal-ray COMMAND --help")
        return 0
    if name not in _COMMANDS:
        what = f"{shown(name)}: unknown command{did_you_mean(name, _COMMANDS)}" if name else "COMMAND: missing"
        print(f"neuronal-ray: error: {what}, expected one of: {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    code: int = import_module(f"neuronal_ray.{name}.__main__").main(sys.argv[2:])
    return code


if __name__ == "__main__":
    sys.exit(main())
