"""`python -m neuronal_ray.report`: one self-contained page about a run, or about one or more sweeps."""

import sys
from collections.abc import Sequence
from pathlib import Path

from neuronal_ray.cli.atomic import check_output, write_text
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import exit_code
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.read_files import is_file
from neuronal_ray.report.style import MARK

_BEGINNING = 1000
"""Bytes of a report within which it has MARK."""


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit code 0 when done, 2 for bad input, 1 for anything else."""
    return exit_code("neuronal-ray report", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="neuronal-ray report",
        description="Write report.html of one pruning run again, or a report on the results of one or more sweeps, "
        "next to the paper's tables. Example: neuronal-ray report runs/small/language --output language.html",
    )
    parser.add_argument(
        "runs",
        metavar="RUNS",
        type=Path,
        nargs="+",
        help="the --output of neuronal-ray prune, or of neuronal-ray sweep",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="file ending in .html or .md; if absent, report.html in RUNS"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the file, also if it is no report (a report always is)"
    )
    arguments = parser.parse_args(argv)
    runs: list[Path] = arguments.runs
    if all(is_file(path / "sweep.json", flag="RUNS") for path in runs):
        output: Path = arguments.output or runs[0] / "report.html"
        _write_study(runs, output, overwrite=arguments.overwrite)
        print(output)
        return
    if len(runs) > 1 or arguments.output is not None:
        raise BadInput(f"RUNS: {runs[0]} has no sweep.json; several directories, and --output, are for sweeps")
    from neuronal_ray.report.run_page import write_report  # imports pyarrow

    _check(runs[0] / "report.html", flag="RUNS", overwrite=arguments.overwrite)
    print(write_report(runs[0]))


def _check(path: Path, *, flag: str, overwrite: bool) -> None:
    """Raise BadInput when the report cannot be written to `path`, or would replace what is no report."""
    check_output(path, kind="file", overwrite=overwrite, earlier=_is_report, flag=flag)


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK.encode() in file.read(_BEGINNING)


def _write_study(runs: Sequence[Path], output: Path, *, overwrite: bool) -> None:
    if output.suffix not in (".html", ".md"):
        raise BadInput(f"--output: {output} ends in neither .html nor .md")
    _check(output, flag="--output", overwrite=overwrite)
    from neuronal_ray.report.study_page import read_studies, study_markdown, study_page  # imports pyarrow

    study = read_studies(runs)
    write_text(output, study_page(study) if output.suffix == ".html" else study_markdown(study))


if __name__ == "__main__":
    sys.exit(main())
