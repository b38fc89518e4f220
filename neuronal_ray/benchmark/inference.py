"""Size, loading, memory and speed of a sparse model and of its dense one, in every runtime that is installed."""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from neuronal_ray.benchmark.output import FORMAT, add_output, check_figures
from neuronal_ray.benchmark.runtimes import RUNTIMES, missing
from neuronal_ray.benchmark.shapes import check_counts
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.parser import Parser

if TYPE_CHECKING:
    from neuronal_ray.benchmark.runtimes.measured import Pair
    from neuronal_ray.benchmark.runtimes.pair import Place, Rounds
    from neuronal_ray.models.checkpoint import Checkpoint

PROG = "neuronal-ray benchmark inference"
_DESCRIPTION = """Compare a sparse model with the dense one that it was made from, in every runtime that is installed:
size on disk, seconds to load, peak memory, memory held, and tokens per second of reading a prompt (prefill) and of
generating (decode). Each model runs in a process of its own, and their rounds alternate. A ratio is printed only if
it exceeds the spread of the rounds; otherwise the table says no gain. Example:
neuronal-ray benchmark inference --model pruned --against huggyllama/llama-7b"""


def main(argv: Sequence[str]) -> None:
    """Measure, print the table, write the file. Raises BadInput for bad input."""
    choices = "\n".join(f"  {name:<14} {runtime.what}" for name, runtime in RUNTIMES.items())
    parser = Parser(
        prog=PROG,
        description=f"{_DESCRIPTION}\n\nruntimes:\n{choices}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the sparse model")
    parser.add_argument("--against", required=True, metavar="DIR", help="the dense model that it was made from")
    parser.add_argument(
        "--runtimes", metavar="NAMES", help="comma-separated (default: all installed ones except compiled)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="rounds that count, after a warm-up (default: 5)"
    )
    parser.add_argument(
        "--batches", default="1,8", metavar="LIST", help="numbers of sequences at a time (default: 1,8)"
    )
    parser.add_argument("--prompt", type=int, default=32, metavar="N", help="tokens of a prompt (default: 32)")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="tokens to generate (default: 16)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the torch runtimes"
    )
    parser.add_argument(
        "--deepsparse-python",
        type=Path,
        metavar="PATH",
        help="Python of an environment with deepsparse 1.8, onnx and numpy; without it deepsparse is left out",
    )
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_counts(arguments, rounds=1, prompt=1, tokens=1, threads=1)
    if arguments.deepsparse_python is not None and not arguments.deepsparse_python.is_file():
        raise BadInput(f"--deepsparse-python: no file {arguments.deepsparse_python}")
    batches = _batches(arguments.batches)
    names = _names(arguments.runtimes, deepsparse=arguments.deepsparse_python is not None)
    check_figures(arguments, models=[arguments.model, arguments.against])

    from neuronal_ray.benchmark.runtimes.measured import REPEATABLE, header
    from neuronal_ray.benchmark.runtimes.pair import Rounds, RuntimeFailed
    from neuronal_ray.cli.atomic import write_json
    from neuronal_ray.cli.versions import versions

    dense, sparse = _checkpoints(arguments.against, arguments.model)
    rounds = Rounds(rounds=arguments.rounds, batches=batches, prompt=arguments.prompt, tokens=arguments.tokens)
    zeros = _zeros(sparse)
    pairs, failed = [], {}
    with tempfile.TemporaryDirectory(prefix="neuronal_ray-") as folder:
        places = _Places(arguments, dense, sparse, rounds, Path(folder))
        print(
            f"{arguments.model}: {100 * zeros:.1f} % zeros in its linears; {places.threads} threads, {places.device}\n"
            f"prompts of {rounds.prompt} tokens, {rounds.tokens} generated; medians of {rounds.rounds} rounds\n"
            f"GiB, tokens per second at {' and '.join(map(str, batches))} sequences"
        )
        print(header(batches), flush=True)
        for name in names:
            try:
                pair = places.measure(name)
            except (RuntimeFailed, BadInput) as error:
                failed[name] = str(error)
                print(f"{name:<14} could not be measured: {error}", flush=True)
                continue
            pairs.append(pair)
            print("\n".join(pair.lines()), flush=True)
    for pair in pairs:
        verdict = "" if pair.repeatability <= REPEATABLE else f", more than {REPEATABLE:.0%}: not reliable"
        print(f"{pair.runtime}: decode repeatable within {pair.repeatability:.1%}{verdict}")
    if arguments.output is not None:
        content = {
            "format": FORMAT,
            "model": arguments.model,
            "against": arguments.against,
            "zeros": zeros,
            "rounds": asdict(rounds),
            "threads": places.threads,
            "device": places.device,
            "pairs": [asdict(pair) | {"repeatability": pair.repeatability} for pair in pairs],
            "failed": failed,
            "versions": versions() | _package_versions(),
        }
        write_json(arguments.output, content)


def _package_versions() -> dict[str, str]:
    """Return the versions of the optional packages that are installed."""
    names = {name for runtime in RUNTIMES.values() for name in runtime.packages if find_spec(name) is not None}
    return {name: version(name) for name in sorted(names)}


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise BadInput(f"--batches: {text!r} is not a comma-separated list of numbers") from error
    if min(batches) < 1 or len(set(batches)) < len(batches):
        raise BadInput(f"--batches: {text!r}: expected different positive numbers")
    return batches


def _names(listed: str | None, *, deepsparse: bool) -> list[str]:
    """Return the runtimes to measure; print on stderr which are left out by default."""
    names = list(RUNTIMES) if listed is None else listed.split(",")
    unknown = [name for name in names if name not in RUNTIMES]
    if unknown:
        raise BadInput(f"--runtimes: unknown {unknown[0]!r}, expected some of: {', '.join(RUNTIMES)}")
    usable = []
    for name in names:
        absent = missing(RUNTIMES[name])
        if name == "deepsparse" and not deepsparse:
            reason = "--deepsparse-python is not given"
        elif absent:
            reason = f"not installed: {', '.join(absent)}; pip install 'neuronal_ray[inference]'"
        elif listed is None and name == "compiled":
            reason = "compiling takes minutes; ask for it with --runtimes compiled"
        else:
            usable.append(name)
            continue
        if listed is not None:
            raise BadInput(f"--runtimes: {name}: {reason}")
        print(f"{PROG}: {name} is left out: {reason}", file=sys.stderr)
    return usable


def _checkpoints(against: str, model: str) -> "tuple[Checkpoint, Checkpoint]":
    from neuronal_ray.models.checkpoint import open_checkpoint
    from neuronal_ray.models.hub import resolve_model

    checkpoints = []
    for flag, name in (("--against", against), ("--model", model)):
        try:
            checkpoints.append(open_checkpoint(resolve_model(name)))
        except BadInput as error:
            raise BadInput(str(error).replace("--model", flag, 1)) from error
    dense, sparse = checkpoints
    shapes = [{name: stored.shape for name, stored in one.tensors.items()} for one in checkpoints]
    if shapes[0] != shapes[1]:
        raise BadInput(f"--against: {against} has other tensors than {model}; expected the model it was made from")
    return dense, sparse


def _zeros(checkpoint: "Checkpoint") -> float:
    """Return the share of zeros in the linears of the blocks."""
    from neuronal_ray.models.output_files import stored_linears
    from neuronal_ray.models.tensor_copies import count_zeros
    from neuronal_ray.models.tensor_files import WORD_BYTES, read_bytes

    zeros = total = 0
    for name in stored_linears(checkpoint):
        stored = checkpoint.tensors[name]
        words = read_bytes(stored).view(f"u{WORD_BYTES[stored.dtype]}")
        zeros += count_zeros(words)
        total += len(words)
    return zeros / total


class _Places:
    """Where the dense and the sparse model lie, as checkpoints and, once a runtime needs them, as graphs."""

    def __init__(
        self, arguments: argparse.Namespace, dense: "Checkpoint", sparse: "Checkpoint", rounds: "Rounds", folder: Path
    ) -> None:
        import torch

        self._models = {"dense": dense, "sparse": sparse}
        self._rounds, self._folder = rounds, folder
        self._deepsparse = arguments.deepsparse_python
        self.threads = arguments.threads or torch.get_num_threads()
        cuda = torch.cuda.is_available()
        if arguments.device == "cuda" and not cuda:
            raise BadInput("--device: there is no CUDA device")
        self.device = "cuda" if cuda and arguments.device != "cpu" else "cpu"

    def measure(self, name: str) -> "Pair":
        from neuronal_ray.benchmark.runtimes.pair import measure_pair

        runtime = RUNTIMES[name]
        return measure_pair(
            name,
            self._place(runtime.dense, "dense", runtime.dtype),
            self._place(name, "sparse", runtime.dtype),
            rounds=self._rounds,
            vocabulary=self._models["dense"].config.get_text_config().vocab_size,
            folder=self._folder,
        )

    def _place(self, name: str, which: str, dtype: str | None) -> "Place":
        from neuronal_ray.benchmark.runtimes import Opening
        from neuronal_ray.benchmark.runtimes.pair import Place

        runtime, checkpoint = RUNTIMES[name], self._models[which]
        path, num_bytes = checkpoint.path, checkpoint.num_bytes
        if runtime.onnx:
            path = self._exported(which)
            num_bytes = sum(file.stat().st_size for file in path.parent.glob("model.onnx*"))
        opening = Opening(
            runtime=name,
            path=path,
            threads=self.threads,
            device="cpu" if runtime.onnx or name in ("packed", "csr") else self.device,
            length=self._rounds.prompt + self._rounds.tokens,
            dtype=dtype,
        )
        python = str(self._deepsparse) if name == "deepsparse" else sys.executable
        return Place(python=python, module=runtime.module, opening=opening, disk_bytes=num_bytes)

    def _exported(self, which: str) -> Path:
        """Export in a process of its own, so that its memory is freed. Raises RuntimeFailed."""
        from neuronal_ray.benchmark.runtimes.pair import RuntimeFailed

        folder = self._folder / which
        if not (folder / "model.onnx").is_file():
            folder.mkdir(exist_ok=True)
            code = (
                "import sys; from pathlib import Path; from neuronal_ray.models.formats.onnx_graph import export_onnx; "
            )
            code += "export_onnx(Path(sys.argv[1]), Path(sys.argv[2]))"
            command = [sys.executable, "-c", code, str(self._models[which].path), str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeFailed(f"export to ONNX failed: {done.stderr.strip().splitlines()[-1]}")
        return folder / "model.onnx"
