"""`python -m neuronal_ray.report`: one self-contained page about a run, or about one or more sweeps."""

import sys
from collections.abc import Sequence
from pathlib import Path

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import exit_code
from neuronal_ray.cli.parser import Parser


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
    arguments = parser.parse_args(argv)
    runs: list[Path] = arguments.runs
    if all((path / "sweep.json").is_file() for path in runs):
        output: Path = arguments.output or runs[0] / "report.html"
        _write_study(runs, output)
        print(output)
        return
    if len(runs) > 1 or arguments.output is not None:
        raise BadInput(f"RUNS: {runs[0]} has no sweep.json; several directories, and --output, are for sweeps")
    from neuronal_ray.report.run_page import write_report  # imports pyarrow

    print(write_report(runs[0]))


def _write_study(runs: Sequence[Path], output: Path) -> None:
    if output.suffix not in (".html", ".md"):
        raise BadInput(f"--output: {output} ends in neither .html nor .md")
    if not output.absolute().parent.is_dir():
        raise BadInput(f"--output: no directory {output.absolute().parent}")
    from neuronal_ray.cli.atomic import write_text
    from neuronal_ray.report.study_page import read_studies, study_markdown, study_page  # imports pyarrow

    study = read_studies(runs)
    write_text(output, study_page(study) if output.suffix == ".html" else study_markdown(study))


if __name__ == "__main__":
    sys.exit(main())
