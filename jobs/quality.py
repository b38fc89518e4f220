"""Which allocation loses least quality at exactly the same sparsity? Measures what a TOML file asks, writes tables.

    python jobs/quality.py jobs/quality.toml --output runs/quality --models DIR --texts DIR --render FILE.md

Rows are appended to OUTPUT/rows.jsonl as they are measured. What is there is not measured again, unless the variant's
flags or the study's settings have changed since; after a change of the code, delete the rows that it concerns.
"""

import argparse
import json
import math
import os
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from quality_measure import Cell, Model, Settings, configure, measure
from quality_tables import AUTHORS, Row, render

from neuronal_ray.cli.exit_codes import exit_code

_BUILTIN = "builtin"


@dataclass(frozen=True, kw_only=True)
class Study:
    """The TOML file; `fixed` are the variants without a search, `first_seed_only` prefixes of variants' names."""

    settings: Settings
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...]
    fixed: tuple[str, ...]
    first_seed_only: tuple[str, ...]
    variants: Mapping[str, str]
    models: tuple[Mapping[str, Any], ...]

    def variants_of(self, seed: int) -> dict[str, str]:
        """The flags by name of what a cell of this seed consists of, the released code's first: it sets the budget."""
        others = {
            name: flags
            for name, flags in self.variants.items()
            if name != AUTHORS and (seed == self.seeds[0] or not name.startswith(self.first_seed_only))
        }
        return {AUTHORS: self.variants[AUTHORS]} | others


def read_study(path: Path) -> Study:
    """The study of a TOML file; ValueError if a table or key is missing or not known."""
    content = tomllib.loads(path.read_text())
    try:
        study, settings = content["study"], Settings(**content["settings"])
        lists = {key: tuple(study[key]) for key in ("sparsities", "seeds", "fixed", "first_seed_only")}
        read = Study(settings=settings, variants=content["variants"], models=tuple(content["models"]), **lists)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if AUTHORS not in read.variants:
        raise ValueError(f"{path}: no variant {AUTHORS!r}, whose sparsity is the target of the others")
    return read


def find_model(entry: Mapping[str, Any], roots: Sequence[Path], output: Path) -> Model | None:
    """The model of a [[models]] table, its files looked for under `roots`; None if one is missing.

    `held_out` cuts the calibration text: its last share becomes the (only) in-domain text. `drop` is taken out of it.
    """

    def find(name: str) -> str:
        return name if name == _BUILTIN else str(next(root / name for root in roots if (root / name).exists()))

    try:
        path, calibration = find(entry["path"]), find(entry["calibration"])
        in_domain, out_of_domain = (tuple(map(find, entry.get(key, ()))) for key in ("in_domain", "out_of_domain"))
    except StopIteration:
        print(f"quality: {entry['name']} skipped: not all of its files are there", file=sys.stderr)
        return None
    if "held_out" in entry:
        text = Path(calibration).read_text()
        if "drop" in entry:
            text = text.replace(entry["drop"], "")
        cut = text.index("\n", int(len(text) * (1 - entry["held_out"])))
        stem = output / "texts" / entry["name"]
        calibration, in_domain = f"{stem}.calibration.txt", (f"{stem}.held-out.txt",)
        stem.parent.mkdir(parents=True, exist_ok=True)
        Path(calibration).write_text(text[:cut])
        Path(in_domain[0]).write_text(text[cut:])
    return Model(
        name=entry["name"], path=path, calibration=calibration, in_domain=in_domain, out_of_domain=out_of_domain
    )


Rows = dict[tuple[str, float, int], dict[str, Row]]
"""The rows of each cell by variant."""


def read_rows(path: Path, study: Study) -> Rows:
    """The last row of each variant of each cell that was measured with today's flags and settings."""
    rows: Rows = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        row = json.loads(line)
        if row["settings"] == asdict(study.settings) and study.variants.get(row["variant"]) == row["flags"]:
            rows.setdefault((row["model"], row["sparsity"], row["seed"]), {})[row["variant"]] = row
    return rows


def missing(cell: Cell, study: Study, rows: Rows) -> list[str]:
    """The variants of a cell without a row, or with one of another sparsity than the released code's."""
    found = rows.get(cell.key, {})
    budget = found[AUTHORS]["zeros"] if AUTHORS in found else None
    return [
        name
        for name in study.variants_of(cell.seed)
        if name not in found or (name != AUTHORS and found[name]["planned"] != budget)
    ]


def run_cell(cell: Cell, study: Study, path: Path) -> list[str]:
    """Measure what is missing of a cell; returns what went wrong, a line for each variant."""
    from neuronal_ray.workers.pools.protocol import TaskError

    rows, failures = read_rows(path, study), []
    for name in missing(cell, study, rows):
        if name != AUTHORS and AUTHORS not in rows.get(cell.key, {}):
            break  # there is no budget
        reference = rows[cell.key][AUTHORS] if name != AUTHORS else None
        label = f"{cell.model.name} {cell.sparsity:g} seed {cell.seed} {name}"
        flags = study.variants[name]
        try:
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
                measured = measure(
                    cell,
                    study.settings,
                    flags,
                    target=cell.sparsity if reference is None else reference["zeros"] / reference["prunable"],
                    budget=None if reference is None else reference["zeros"],
                )
        except (ValueError, TaskError) as error:
            failures.append(f"{label}: {error}")
            continue
        known: Row = {"model": cell.model.name, "sparsity": cell.sparsity, "seed": cell.seed, "variant": name}
        row = {**known, "flags": flags, "settings": asdict(study.settings), **measured}
        with path.open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")  # one write: other processes append as well
        rows.setdefault(cell.key, {})[name] = row
        values = " ".join(
            f"{value or math.inf:.3f}" for texts in row["perplexity"].values() for value in texts.values()
        )
        print(f"  {label}: {values} ({sum(row['seconds'].values()):.1f} s)", file=sys.stderr, flush=True)
    return failures


def run_cells(cells: Sequence[Cell], study: Study, path: Path, *, jobs: int) -> list[str]:
    """`run_cell` of those with something missing, in `jobs` processes of one thread; returns what went wrong."""
    rows = read_rows(path, study)
    todo = [cell for cell in cells if missing(cell, study, rows)]
    print(f"quality: {len(todo)} of {len(cells)} cells to measure", file=sys.stderr, flush=True)
    if not todo:
        return []
    os.environ["OMP_NUM_THREADS"] = "1"  # read when the processes import torch
    begin, failures = time.perf_counter(), list[str]()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        waiting = {executor.submit(run_cell, cell, study, path): cell for cell in todo}
        for done, future in enumerate(as_completed(waiting), start=1):
            failures += future.result()
            spent = time.perf_counter() - begin
            left = spent / done * (len(todo) - done) / 60
            print(f"[{spent:7.0f} s] {done}/{len(todo)} cells, {left:.0f} min left", file=sys.stderr, flush=True)
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for bad input or if a variant failed."""
    return exit_code("quality", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", type=Path, help="TOML file, for example jobs/quality.toml")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where rows.jsonl is")
    for flag in ("models", "texts"):
        parser.add_argument(
            f"--{flag}", type=Path, action="append", default=[], metavar="DIR", help=f"that hold {flag}"
        )
    parser.add_argument("--only", metavar="MODEL,..", help="only these models; an empty string for none")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes, each of one thread (default: 1)")
    parser.add_argument("--render", type=Path, metavar="FILE", help="write the tables of all rows there are")
    options = parser.parse_args(argv)
    study, roots = read_study(options.study), [*options.texts, *options.models, Path()]
    only = None if options.only is None else set(options.only.split(","))
    entries = [entry for entry in study.models if only is None or entry["name"] in only]
    options.output.mkdir(parents=True, exist_ok=True)
    models = [model for entry in entries if (model := find_model(entry, roots, options.output))]
    cells = [
        Cell(model=model, sparsity=sparsity, seed=seed)
        for model, seed, sparsity in product(models, study.seeds, study.sparsities)
    ]
    for flags in study.variants.values() if cells else ():
        configure(cells[0], study.settings, flags, target=cells[0].sparsity)
    path = options.output / "rows.jsonl"
    failures = run_cells(cells, study, path, jobs=options.jobs)
    if options.render is not None:
        found = [row for variants in read_rows(path, study).values() for row in variants.values()]
        options.render.write_text(render(found, list(study.variants), study.fixed))
    if failures:
        raise ValueError(f"{len(failures)} variants failed: {'; '.join(failures)}")


if __name__ == "__main__":
    sys.exit(main())
