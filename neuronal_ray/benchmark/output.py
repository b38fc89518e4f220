"""The file that a measurement writes: its options and the check that it can be written."""

import argparse
from collections.abc import Iterable
from pathlib import Path

from neuronal_ray.cli.atomic import check_output, has_format

FORMAT = "neuronal_ray benchmark"


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the options for the file of the figures."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file to write the figures and the machine to")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file, also if no benchmark wrote it"
    )


def check_figures(arguments: argparse.Namespace, *, models: Iterable[str] = ()) -> None:
    """Raise BadInput, before anything is measured, when the file of the figures cannot be written.

    A file that a benchmark wrote is replaced. `models` are read.
    """
    if arguments.output is not None:
        check_output(
            arguments.output,
            kind="file",
            overwrite=arguments.overwrite,
            earlier=lambda path: has_format(path, FORMAT),
            models=models,
        )
