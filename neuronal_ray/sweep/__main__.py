"""`python -m neuronal_ray.sweep`: many pruning runs and their evaluations, from one file."""

import sys
from collections.abc import Sequence
from pathlib import Path

from neuronal_ray.cli.exit_codes import Unfinished, exit_code
from neuronal_ray.cli.parser import Parser

_DESCRIPTION = """Prune and evaluate a grid of models, methods, allocations and sparsities. Work that cells have in
common is done once; results are written to OUTPUT/results/*.parquet, one row per cell and evaluation. Example:
neuronal-ray sweep jobs/small/language.toml && neuronal-ray report runs/small/language --output language.html"""


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit code 0 when done, 2 for bad input, 1 when cells failed or for anything else."""
    return exit_code("neuronal-ray sweep", lambda: _main(sys.argv[1:] if argv is None else argv))


def _parser() -> Parser:
    parser = Parser(prog="neuronal-ray sweep", description=_DESCRIPTION)
    parser.add_argument(
        "file", metavar="FILE", type=Path, help="TOML file with [options], [grid], [[variant]], [[skip]]"
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, help="directory of the results, instead of the one that the file names"
    )
    parser.add_argument("--address", help="where workers run, as for prune: none, local, auto or an address")
    parser.add_argument("--revision", help="branch, tag or commit of the models, as for prune")
    parser.add_argument("--replicas", metavar="N", type=int, help="workers, each with the whole model")
    parser.add_argument(
        "--option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of prune for all cells, instead of the file's own value; a list makes it a row of the grid: "
        "--option model=gpt2 --option 'sparsity=[0.6, 0.7]'; may be repeated",
    )
    parser.add_argument(
        "--max-cells",
        metavar="N",
        type=int,
        default=10_000,
        help="refuse a grid of more cells than this, before any is made; default: 10,000",
    )
    parser.add_argument("--resume", action="store_true", help="continue where an earlier run of this sweep stopped")
    parser.add_argument("--dry-run", action="store_true", help="check every cell, print what the sweep needs, and stop")
    return parser


def _main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    from neuronal_ray.sweep.config import read_override, read_study

    overrides = dict(read_override(text) for text in arguments.option)
    overrides |= {
        name: value
        for name, value in (
            ("address", arguments.address),
            ("replicas", arguments.replicas),
            ("revision", arguments.revision),
        )
        if value is not None
    }
    study = read_study(arguments.file, overrides, output=arguments.output, max_cells=arguments.max_cells)
    # What follows imports torch and transformers: after the file is known to be good.
    from neuronal_ray.cli.progress import Progress
    from neuronal_ray.prune.inputs import Reader
    from neuronal_ray.sweep.dry_run import describe_study
    from neuronal_ray.sweep.files import begin_store, find_store
    from neuronal_ray.sweep.inputs import prepare_study
    from neuronal_ray.sweep.pipeline import run_study

    store = find_store(study, resume=arguments.resume or arguments.dry_run)
    reader = Reader()
    ready = prepare_study(study, reader)
    print(describe_study(study, ready), flush=True)
    if arguments.dry_run:
        return
    try:
        begin_store(study, store)
        outcome = run_study(ready, store, reader, Progress(study.output / "events.jsonl"))
    except OSError as error:  # a full disk, for example
        kept = "--resume goes on" if (study.output / "sweep.json").is_file() else "nothing was written"
        raise Unfinished(f"{error}; {kept}") from error
    print(f"{outcome.finished} cells done, {outcome.skipped} were done before, {len(outcome.failed)} failed")
    print(f"results: {study.output / 'results'}/*.parquet")
    print(f"report:  neuronal-ray report {study.output} --output {study.output / 'report.html'}")
    if outcome.failed:
        for failure in outcome.failed.values():
            print(f"neuronal-ray sweep: failed: {failure}", file=sys.stderr)
        raise Unfinished(f"{len(outcome.failed)} cells failed; --resume tries them again")


if __name__ == "__main__":
    sys.exit(main())
