"""Options of `neuronal-ray export`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.options import Option


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `neuronal-ray export`."""

    model: Annotated[
        str, Option("str", "a dense model directory, as prune writes it, an id on the Hugging Face hub, or `builtin`")
    ]
    revision: Annotated[
        str | None,
        Option("str", "the branch, tag or commit of a model on the hub; default: its main branch"),
    ] = None
    format: Annotated[
        str,
        Option(
            "str",
            "dense: check the directory, and copy it to --output if there is one; packed: bits and non-zero values, "
            "for neuronal_ray.load_packed; masks: one file with the masks, for --masks; onnx: a graph that generates, "
            "for ONNX Runtime (needs neuronal_ray[inference])",
            choices=("dense", "packed", "masks", "onnx"),
        ),
    ] = "dense"
    output: Annotated[
        Path | None,
        Option("path", "what to write: a directory, or for masks a .safetensors file; it must not exist yet"),
    ] = None
    overwrite: Annotated[
        bool, Option("switch", "replace the output if it exists: a directory that an earlier run wrote, or a file")
    ] = False
    masks: Annotated[
        Path | None,
        Option(
            "path",
            "masks of another copy of the model, in any dtype: --output becomes a dense copy of --model in which the "
            "same weights are zero",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Option("switch", "run the Python code that comes with the model; only for sources you trust")
    ] = False

    def check(self) -> None:
        """Raise BadInput, naming the flag, for values that can never work."""
        if self.output is None and (self.format != "dense" or self.masks is not None):
            raise BadInput("--output: missing, expected what to write")
        if self.masks is not None and self.format != "dense":
            raise BadInput(f"--masks: applied to a dense copy only, --format {self.format} does not go with it")
        if self.format == "masks" and self.output is not None and self.output.suffix != ".safetensors":
            raise BadInput(f"--output: {self.output} is not a .safetensors file, which masks are written to")

    def warn_of_ignored(self) -> None:
        """Warn of options that have no effect given the others: none here."""
