"""What a sweep saves by sharing: the cells of one sweep, and the same as separate commands, measured in one run."""

import argparse
import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import neuronal_ray.prune.__main__
import neuronal_ray.sweep.__main__
from neuronal_ray.benchmark.record import check_output, publish
from neuronal_ray.benchmark.shapes import check_counts
from neuronal_ray.sweep.config import Cell, read_study

METHODS = ("magnitude", "multiflow", "wanda", "sparsegpt")
ALLOCATIONS = ("uniform", "owl", "alphapruning", "dlp", "neuronal")
SPARSITIES = (0.6, 0.7, 0.8)
_TOO_SLOW = 3.0


@dataclass(frozen=True, kw_only=True)
class SweepMeasured:
    """Seconds of a sweep, and of its cells as separate `prune` commands in the same process, one after the other."""

    cells: int
    sweep_s: float
    separate_s: float
    sweep_s_by_method: dict[str, float]
    separate_s_by_method: dict[str, float]

    def lines(self) -> list[str]:
        """The rows of the printed table."""
        rows = [
            f"  {method:<12} {self.separate_s_by_method[method]:9.1f} s {self.sweep_s_by_method[method]:9.1f} s   "
            f"ratio {self.separate_s_by_method[method] / self.sweep_s_by_method[method]:.2f}"
            for method in self.sweep_s_by_method
        ]
        return [
            f"sweep of {self.cells} cells on the built-in model: separate commands, and sweeps of one method each",
            *rows,
            f"  all in one   {self.separate_s:9.1f} s {self.sweep_s:9.1f} s   "
            f"ratio {self.separate_s / self.sweep_s:.2f} (at least {_TOO_SLOW:g})",
        ]


def main(argv: Sequence[str]) -> None:
    """Measure on the built-in model."""
    parser = argparse.ArgumentParser(
        prog="neuronal-ray benchmark sweep",
        description="60 cells on the built-in model as one sweep and as separate commands: about 20 minutes on a core.",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the figures and the machine")
    arguments = parser.parse_args(argv)
    check_counts(arguments, threads=1)
    check_output(arguments.output)
    with TemporaryDirectory() as folder:
        measured = measure_sweep(Path(folder), threads=arguments.threads)
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def measure_sweep(folder: Path, *, threads: int | None, methods: tuple[str, ...] = METHODS) -> SweepMeasured:
    """Run every cell both ways; the results are thrown away."""
    file = folder / "sweep.toml"
    file.write_text(_study(threads))
    study = read_study(file, {"method": list(methods)}, output=folder / "unused")
    separate = dict.fromkeys(methods, 0.0)
    together = dict.fromkeys(methods, 0.0)
    for method in methods:
        words = [str(file), "--option", f'method=["{method}"]']
        together[method] = _timed(
            neuronal_ray.mainsweep.__main__.main, [*words, "--output", str(folder / f"sweep-{method}")]
        )
        for number, cell in enumerate(cell for cell in study.cells if cell.config.method == method):
            words = _arguments(cell, folder / f"{method}-{number}", threads)
            separate[method] += _timed(neuronal_ray.mainprune.__main__.main, words)
    names = ", ".join(f'"{method}"' for method in methods)
    words = [str(file), "--output", str(folder / "sweep"), "--option", f"method=[{names}]"]
    return SweepMeasured(
        cells=len(study.cells),
        sweep_s=_timed(neuronal_ray.mainsweep.__main__.main, words),
        separate_s=sum(separate.values()),
        sweep_s_by_method=together,
        separate_s_by_method=separate,
    )


def _study(threads: int | None) -> str:
    lines = [
        'title = "benchmark"',
        "[options]",
        'model = "builtin"',
        'calibration = "builtin"',
        'evaluate = ["builtin"]',
        "sequence-length = 256",
        'mode = "paper"',
        'address = "none"',
        *([f"threads = {threads}"] if threads else []),
        "[grid]",
        'method = ["wanda"]',
        f"sparsity = {list(SPARSITIES)}",
    ]
    for allocation in ALLOCATIONS:
        lines += ["[[variant]]", f'name = "{allocation}"', f'allocation = "{allocation}"']
    return "\n".join(lines) + "\n"


def _arguments(cell: Cell, output: Path, threads: int | None) -> list[str]:
    config = cell.config
    options = {
        "model": config.model,
        "calibration": config.calibration,
        "evaluate": ",".join(config.evaluate),
        "sequence-length": str(config.sequence_length),
        "mode": config.mode,
        "address": "none",
        "method": config.method,
        "allocation": str(config.allocation),
        "sparsity": str(config.sparsity),
        "output": str(output),
    } | ({"threads": str(threads)} if threads else {})
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _timed(main: object, words: list[str]) -> float:
    assert callable(main)
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(words)
    if code != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {code}")
    return time.perf_counter() - begin
