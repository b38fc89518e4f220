"""`python -m neuronal_ray.export`: check a pruned model, or write it in another form."""

import sys
from collections.abc import Sequence

from neuronal_ray.cli.exit_codes import Unfinished, exit_code
from neuronal_ray.cli.options import parse_config
from neuronal_ray.export.config import ExportConfig

_DESCRIPTION = """Check a pruned model directory, or write it in another form. Examples:
neuronal-ray export --model pruned --format packed --output pruned-packed
(about a third of the size at 70 % sparsity; neuronal_ray.load_packed reads it), and
neuronal-ray export --model pruned --format masks --output masks.safetensors,
neuronal-ray export --model another-copy --masks masks.safetensors --output pruned-copy"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray export", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    config = parse_config(ExportConfig, argv, prog="neuronal-ray export", description=_DESCRIPTION)
    # The imports below load torch and transformers: only once the options are known to be good.
    from neuronal_ray.cli.atomic import check_apart, check_output
    from neuronal_ray.export.formats import WRITERS
    from neuronal_ray.models.checkpoint import open_checkpoint
    from neuronal_ray.models.hub import resolve_model

    if config.output is not None:
        check_output(
            config.output,
            kind="file" if config.format == "masks" else "directory",
            overwrite=config.overwrite,
            models=[config.model],
            inputs=[] if config.masks is None else [config.masks],
        )
    checkpoint = open_checkpoint(
        resolve_model(config.model, config.revision), trust_remote_code=config.trust_remote_code
    )
    if config.output is not None:
        check_apart(config.output, models=[checkpoint.path])  # known by now, also for a name on the hub
    try:
        lines = WRITERS[config.format](config, checkpoint)
    except OSError as error:
        raise Unfinished(f"{error}; nothing was written") from error
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
