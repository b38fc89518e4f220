"""The models that are measured: the built-in one, a wide one, and the shapes of Llama 2 with random weights."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from neuronal_ray.benchmark.output import add_output
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.threads import check_threads
from neuronal_ray.models.hub import resolve_model
from neuronal_ray.models.synthetic import write_random_llama

BUILTIN = "builtin"
_CONTEXT = 2048
_MOST = 10**9


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaMA's configuration, the length of the sequences that it is measured on and the dtype it is stored in."""

    config: dict[str, int]
    length: int = _CONTEXT
    dtype: torch.dtype = torch.bfloat16


SHAPES = {
    "wide": Shape(
        config={
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "vocab_size": 2048,
        },
        length=512,
        dtype=torch.float32,
    ),
    "1b": Shape(
        config={
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
        }
    ),
    "7b": Shape(
        config={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    ),
    "13b": Shape(
        config={"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    ),
    "70b": Shape(
        config={
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        }
    ),
}
"""The shapes of models made with random weights: a wide one, TinyLlama's and those of Llama 2."""


def length_of(name: str) -> int:
    """Return the length of the sequences that a model is measured on."""
    return 256 if name == BUILTIN else SHAPES[name].length


def model_path(name: str, folder: Path, *, blocks: int | None = None) -> Path:
    """Return the model's directory, made in `folder` if it is not there yet; `blocks`: only so many of its blocks.

    Raises BadInput when the disk has too little room, or when the model has fewer blocks.
    """
    if name == BUILTIN:
        if blocks is not None:
            raise BadInput("--blocks: the built-in model is measured whole; choose another --shape")
        return resolve_model(BUILTIN)
    shape = SHAPES[name]
    all_blocks = shape.config["num_hidden_layers"]
    if blocks is not None and not 1 <= blocks <= all_blocks:
        raise BadInput(f"--blocks: {blocks} of a model of {all_blocks} blocks")
    blocks = blocks or all_blocks
    path = folder / f"llama-{name}-{blocks}"
    if not path.is_dir():
        config = shape.config | {"num_hidden_layers": blocks, "max_position_embeddings": _CONTEXT}
        write_random_llama(path, config, dtype=shape.dtype)
    return path


@contextmanager
def kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    """Yield `folder`, where checkpoints stay for another run, or else a folder that is removed in the end."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with TemporaryDirectory(prefix="neuronal-ray-") as temporary:
        yield Path(temporary)


def add_model_options(parser: Parser, *, shape: str) -> None:
    """Add the options that choose the model, the device and the output."""
    names = ", ".join((BUILTIN, *SHAPES))
    parser.add_argument("--shape", default=shape, metavar="NAME", help=f"{names} (default: {shape})")
    parser.add_argument(
        "--blocks", type=int, metavar="N", help="measure only the first N blocks of the shape (default: all)"
    )
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="where random checkpoints are kept for the next run (default: a temporary directory; 7b takes 13 GB)",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if there is one)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add_output(parser)


def shape_names(text: str) -> list[str]:
    """Split comma-separated names. Raises BadInput for one that is unknown."""
    names = text.split(",")
    for name in names:
        if name != BUILTIN and name not in SHAPES:
            raise BadInput(f"--shape: unknown name {name!r}, expected one of: {', '.join((BUILTIN, *SHAPES))}")
    return names


def device_of(choice: str) -> str:
    """Return the device to measure on. Raises BadInput when this machine lacks it."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device: no CUDA device on this machine")
    return ("cuda" if torch.cuda.is_available() else "cpu") if choice == "auto" else choice


def check_counts(arguments: argparse.Namespace, **least: int) -> None:
    """Raise BadInput when a given option is less than its minimum in `least`, or too large for any machine."""
    for name, lowest in least.items():
        value = getattr(arguments, name)
        if value is not None and value < lowest:
            raise BadInput(f"--{name.replace('_', '-')}: {value}, expected at least {lowest}")
        if value is not None and value > _MOST:
            raise BadInput(f"--{name.replace('_', '-')}: {value} is too large")
    if "threads" in least:
        check_threads(arguments.threads)
