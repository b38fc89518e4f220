"""The time of a whole run: loading, statistics, search, three perplexities dense and pruned, files."""

import contextlib
import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from neuronal_ray.benchmark.device import device_peak, forget_peak
from neuronal_ray.benchmark.output import check_figures
from neuronal_ray.benchmark.record import machine, publish
from neuronal_ray.benchmark.shapes import (
    add_model_options,
    check_counts,
    device_of,
    kept_or_temporary,
    length_of,
    model_path,
    shape_names,
)
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import DONE, Unfinished
from neuronal_ray.cli.memory import peak_bytes
from neuronal_ray.cli.parser import Parser
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.prune.__main__ import main as prune
from neuronal_ray.workers.footprint import GIB

_DESCRIPTION = """Time one whole `neuronal-ray prune` in this process, on random weights and random text: scores from
128 sequences, NeuronAL's search on 8, perplexity dense and pruned on three texts as long as WikiText-2, C4 and PTB,
and the output files. Needs twice the model's size on disk. Example:
neuronal-ray benchmark job --shape 7b --dtype bfloat16 --checkpoints /scratch --output job.json"""
_WINDOWS = "166,256,55"


@dataclass(frozen=True, kw_only=True)
class JobMeasured:
    """Seconds of each stage, as pruning.json has them, and of the whole command."""

    name: str
    device: str
    dtype: str
    blocks: int
    calibration_samples: int
    search_samples: int
    length: int
    windows: tuple[int, ...]
    stages: dict[str, float]
    total_s: float
    device_bytes: int | None
    host_bytes: int

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
        memory = "" if self.device_bytes is None else f"device {self.device_bytes / GIB:.2f} GiB, "
        between_s = self.total_s - sum(self.stages.values())
        return [
            f"{self.name} ({self.dtype}, {self.device}): {self.blocks} blocks, scores from {self.calibration_samples}, "
            f"search on {self.search_samples}, perplexity on {' + '.join(map(str, self.windows))} sequences of "
            f"{self.length} tokens",
            *(
                f"  {name:<28} {spent:9.2f} s   {spent / self.total_s:6.1%}"
                for name, spent in (self.stages | {"between stages": between_s}).items()
            ),
            f"  {'whole job':<28} {self.total_s:9.2f} s",
            f"  peak memory: {memory}host {self.host_bytes / GIB:.2f} GiB",
        ]


def main(argv: Sequence[str]) -> None:
    """Measure one shape."""
    parser = Parser(prog="neuronal-ray benchmark job", description=_DESCRIPTION)
    add_model_options(parser, shape="wide")
    parser.add_argument("--calibration-samples", type=int, default=128, metavar="N", help="(default: 128)")
    parser.add_argument(
        "--search-samples",
        type=int,
        default=8,
        metavar="N",
        help="of the calibration sequences, the first (default: 8)",
    )
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each (default: 2048; builtin 256, wide 512)")
    parser.add_argument(
        "--windows", default=_WINDOWS, metavar="N,N,N", help=f"sequences of each text (default: {_WINDOWS})"
    )
    arguments = parser.parse_args(argv)
    (name, *more), device = shape_names(arguments.shape), device_of(arguments.device)
    if more:
        raise BadInput(f"--shape: {arguments.shape}, expected one name")
    check_counts(arguments, search_samples=1, calibration_samples=arguments.search_samples, length=2, threads=1)
    windows = tuple(_count(words) for words in arguments.windows.split(","))
    check_figures(arguments)
    print(machine(), flush=True)
    with kept_or_temporary(arguments.checkpoints) as folder, TemporaryDirectory(dir=folder, prefix="job-") as scratch:
        measured = measure_job(
            name,
            model_path(name, folder, blocks=arguments.blocks),
            Path(scratch),
            device=device,
            dtype=arguments.dtype,
            calibration_samples=arguments.calibration_samples,
            search_samples=arguments.search_samples,
            length=arguments.length or length_of(name),
            windows=windows,
            threads=arguments.threads,
        )
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise BadInput(f"--windows: {word!r}, expected numbers of sequences such as {_WINDOWS}")
    return int(word)


def measure_job(
    name: str,
    path: Path,
    scratch: Path,
    *,
    device: str,
    dtype: str,
    calibration_samples: int,
    search_samples: int,
    length: int,
    windows: tuple[int, ...],
    threads: int | None,
) -> JobMeasured:
    """Prune the model at `path` into the folder `scratch`, where all files stay."""
    vocabulary = open_checkpoint(path).config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    files = []
    for number, count in enumerate((calibration_samples, *windows)):
        files.append(str(scratch / f"text{number}.safetensors"))
        save_file({"input_ids": torch.randint(vocabulary, (count, length), generator=generator)}, files[-1])
    options = {
        "model": str(path),
        "output": str(scratch / "pruned"),
        "sparsity": "0.7",
        "mode": "paper",
        "calibration": files[0],
        "evaluate": ",".join(files[1:]),
        "calibration-samples": str(calibration_samples),
        "search-samples": str(search_samples),
        "sequence-length": str(length),
        "device": device,
        "dtype": dtype,
        "address": "none",
    } | ({"threads": str(threads)} if threads else {})
    forget_peak(torch.device(device))
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = prune([word for option, value in options.items() for word in (f"--{option}", value)])
    if code != DONE:
        raise Unfinished(f"the job ended with {code}")
    total_s = time.perf_counter() - begin
    summary = json.loads((scratch / "pruned" / "pruning.json").read_text())
    return JobMeasured(
        name=name,
        device=", ".join(summary["devices"]),
        dtype=dtype,
        blocks=open_checkpoint(path).config.get_text_config().num_hidden_layers,
        calibration_samples=calibration_samples,
        search_samples=search_samples,
        length=length,
        windows=windows,
        stages=summary["seconds"],
        total_s=total_s,
        device_bytes=device_peak(torch.device(device)),
        host_bytes=peak_bytes(),
    )
