"""`python -m neuronal_ray.export`: check a pruned model, or write it in another form."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import Unfinished, exit_code
from neuronal_ray.cli.options import Option, parse_config

if TYPE_CHECKING:
    from neuronal_ray.models.checkpoint import Checkpoint
    from neuronal_ray.models.formats.audit import LinearZeros
    from neuronal_ray.models.formats.packed import PackedModel

_DESCRIPTION = """Check a pruned model directory, or write it in another form. Examples:
neuronal-ray export --model pruned --format packed --output pruned-packed
(about a third of the size at 70 %; neuronal_ray.load_packed reads it), and
neuronal-ray export --model pruned --format masks --output masks.safetensors,
neuronal-ray export --model another-copy --masks masks.safetensors --output pruned-copy"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray export", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    config = parse_config(ExportConfig, argv, prog="neuronal-ray export", description=_DESCRIPTION)
    # What follows imports torch and transformers: after the options are known to be good.
    from neuronal_ray.cli.atomic import check_output
    from neuronal_ray.models.checkpoint import open_checkpoint, resolve_model

    if config.output is not None:
        if config.output.exists():
            raise BadInput(f"--output: {config.output} exists already; name another")
        check_output(config.output, overwrite=False)
    checkpoint = open_checkpoint(resolve_model(config.model), trust_remote_code=config.trust_remote_code)
    try:
        lines = _FORMATS[config.format](config, checkpoint)
    except OSError as error:
        raise Unfinished(f"{error}; nothing was written") from error
    print("\n".join(lines))


# -- formats: each writes --output and returns what is to be said


def _dense(config: "ExportConfig", checkpoint: "Checkpoint") -> list[str]:
    """A Hugging Face directory with zeros in it, as `prune` writes it: checked, and copied if there is an output."""
    from neuronal_ray.cli.atomic import staged
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.models.formats.audit import audit
    from neuronal_ray.models.formats.masks import apply_masks, check_masks, open_masks
    from neuronal_ray.models.output_files import copy_whole
    from neuronal_ray.models.tensor_files import check_room

    if config.output is not None:
        check_room(config.output, checkpoint.num_bytes, flag="--output")
    progress = Progress()
    masks = None if config.masks is None else open_masks(config.masks)
    if masks is not None:
        check_masks(masks, checkpoint)
    else:
        with progress.stage("checking", len(checkpoint.tensors)) as advance:
            linears = audit(checkpoint, advance=advance, trust_remote_code=config.trust_remote_code)
    if config.output is None:
        return _sparsity(linears)
    with staged(config.output) as staging:
        with progress.stage("copying", len(checkpoint.files)) as advance:
            written = copy_whole(checkpoint, staging, advance=advance)
        if masks is not None:
            with progress.stage("masking", len(masks.shapes)) as advance:
                apply_masks(masks, written, advance=advance)
            (staging / "pruning.json").unlink(missing_ok=True)  # of what the copy no longer is
            with progress.stage("checking", len(checkpoint.tensors)) as advance:
                linears = audit(written, advance=advance, trust_remote_code=config.trust_remote_code)
    return [*_sparsity(linears), f"model: {config.output}"]


def _packed(config: "ExportConfig", checkpoint: "Checkpoint") -> list[str]:
    """Bits and values in place of sparse tensors, to be loaded with `neuronal_ray.load_packed`."""
    from neuronal_ray.cli.atomic import staged
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.models.formats.packed import open_packed, write_packed
    from neuronal_ray.models.output_files import copy_descriptions

    assert config.output is not None
    with staged(config.output) as staging:
        copy_descriptions(checkpoint, staging)
        with Progress().stage("packing", len(checkpoint.files)) as advance:
            write_packed(checkpoint, staging, advance=advance)
        packed = open_packed(staging, trust_remote_code=config.trust_remote_code)
        lines = _sizes(packed)
    return [*lines, f"packed model: {config.output}"]


def _masks(config: "ExportConfig", checkpoint: "Checkpoint") -> list[str]:
    """One file with a bit per weight of the linears, to be applied with --masks."""
    from neuronal_ray.cli.atomic import staged_file
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.models.formats.masks import write_masks
    from neuronal_ray.models.output_files import stored_linears

    assert config.output is not None
    names = stored_linears(checkpoint, trust_remote_code=config.trust_remote_code)
    with staged_file(config.output) as staging, Progress().stage("masks", len(names)) as advance:
        size = write_masks(checkpoint, names, staging, advance=advance)
    return [f"masks of {len(names)} tensors, {size:,} bytes: {config.output}"]


def _onnx(config: "ExportConfig", checkpoint: "Checkpoint") -> list[str]:
    """A graph that generates, with a key/value cache, for ONNX Runtime and others."""
    from neuronal_ray.cli.atomic import staged
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.models.formats.onnx_graph import FILE, check_needs, export_onnx

    assert config.output is not None
    check_needs()
    with staged(config.output) as staging, Progress().stage("onnx", 1) as advance:
        export_onnx(checkpoint.path, staging)
        advance("")
    size = sum(file.stat().st_size for file in config.output.glob(f"{FILE}*"))
    return [f"{FILE} and its weights, {size:,} bytes in float32, zeros included: {config.output}"]


_FORMATS: dict[str, Callable[["ExportConfig", "Checkpoint"], list[str]]] = {
    "dense": _dense,
    "packed": _packed,
    "masks": _masks,
    "onnx": _onnx,
}


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Options of `neuronal_ray.export`."""

    model: Annotated[
        str,
        Option("str", "a dense model directory, as prune writes it, or an id on the Hugging Face hub, or `builtin`"),
    ]
    format: Annotated[
        str,
        Option(
            "str",
            "dense: check the directory, and copy it to --output if there is one; packed: bits and non-zero values, "
            "for neuronal_ray.load_packed; masks: one file that says which weights stay, for --masks; onnx: a graph "
            "that generates, for ONNX Runtime (needs neuronal_ray[inference])",
            choices=tuple(_FORMATS),
        ),
    ] = "dense"
    output: Annotated[
        Path | None,
        Option("path", "what to write: a directory, or for masks a .safetensors file; it must not exist yet"),
    ] = None
    masks: Annotated[
        Path | None,
        Option(
            "path",
            "mask file of another copy of the model, in any dtype: --output becomes a dense copy of --model with the "
            "same weights zero",
        ),
    ] = None
    trust_remote_code: Annotated[
        bool, Option("switch", "run Python code that comes with the model; only for sources you trust")
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
        """Say which options have no effect beside the others: none here."""


def _sparsity(linears: Sequence["LinearZeros"]) -> list[str]:
    """The zeros of each tensor of linears, and of all."""
    width = max(len(linear.name) for linear in linears)
    zeros, size = sum(linear.zeros for linear in linears), sum(linear.size for linear in linears)
    rows = [
        f"{linear.name:<{width}}  {' x '.join(map(str, linear.shape)):>18}  {linear.zeros / linear.size:8.4%}"
        for linear in linears
    ]
    return [*rows, f"{zeros:,} of {size:,} weights are zero: {zeros / size:.4%}"]


def _sizes(packed: "PackedModel") -> list[str]:
    """Bytes before and after, and the least that bits and values take."""
    sparse = [one for one in packed.tensors.values() if one.bits is not None]
    others = [one for one in packed.tensors.values() if one.bits is None]
    files = sum(file.stat().st_size for file in packed.files)
    lines = [f"{len(others)} tensors as they were: {sum(one.num_bytes for one in others):,} bytes"]
    if sparse:
        dense, now = sum(one.dense_bytes for one in sparse), sum(one.num_bytes for one in sparse)
        kept = sum(one.kept for one in sparse) / sum(one.size for one in sparse)
        lines += [
            f"{len(sparse)} tensors packed, {kept:.4%} of their weights kept: {now:,} bytes, {now / dense:.4%} of "
            f"{dense:,}; the least for bits and values is {sum(one.least_bytes for one in sparse):,}",
        ]
    return [*lines, f"files: {files:,} bytes, headers included"]


if __name__ == "__main__":
    sys.exit(main())
