"""A sweep that is taken up again: what its files say is checked, and nothing is written where it cannot be read."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from results import row

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.report.inputs import read_results
from neuronal_ray.sweep.config import Study, read_study
from neuronal_ray.sweep.files import open_store

FILE = 'title = "x"\n[options]\nmodel = "some/model"\nallocation = "uniform"\n[grid]\nseed = [0, 1]\n'


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "x.toml").write_text(FILE)
    study = read_study(tmp_path / "x.toml", {}, output=tmp_path / "runs")
    store = open_store(study, resume=False)
    for cell in study.cells:
        store.keep(row(cell=cell.id))
        store.publish(cell.id)
    return study


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def result(**changes: object) -> str:
    return json.dumps({"event": "result", "row": asdict(row()) | changes})


PLAN = {"steps": [], "seconds": 1.0, "search_seconds": 1.0, "lower_ties_first": False, "solver_rates": []}


@pytest.mark.parametrize(
    "line",
    [
        result(cell="../../outside"),
        result(cell="/tmp/outside"),
        result(cell="0" * 12 + "\n"),
        result(cell=""),
        result(cell="0" * 11 + "\u0663"),
        json.dumps({"event": "planned", "cell": "../outside"} | PLAN),
        json.dumps({"event": "planned", "cell": "0" * 12} | PLAN | {"seconds": None}),
        result(value="12"),
        result(value=-1.0),
        result(sparsity=7),
        result(value=1e400).replace("Infinity", "1e400"),
        json.dumps({"event": "other"}),
        "{",
    ],
)
def test_a_journal_that_cannot_be_read_leaves_everything_as_it_was(line: str, study: Study, tmp_path: Path) -> None:
    journal = study.output / "journal.jsonl"
    journal.write_text(f"{journal.read_text()}\n{line}\n{result()}")
    before = content_of(tmp_path)
    with pytest.raises(BadInput, match=f"^--resume: line 4 of {journal}"):
        open_store(study, resume=True)
    assert content_of(tmp_path) == before


def test_a_last_line_that_was_cut_short_is_dropped(study: Study) -> None:
    with (study.output / "journal.jsonl").open("a") as file:
        file.write("\n" + result()[:40])
    assert len(open_store(study, resume=True).rows) == 2


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"format": 2, "cells": {}}', '{"format": 1, "cells": []}', '{"format": 1, "cells": {"../x": {}}}'],
)
def test_another_sweep_json_is_refused(text: str, study: Study, tmp_path: Path) -> None:
    (study.output / "sweep.json").write_text(text)
    before = content_of(tmp_path)
    with pytest.raises(BadInput, match="--output: "):
        open_store(study, resume=True)
    assert content_of(tmp_path) == before


def test_a_row_of_the_results_whose_name_is_a_path_is_refused(study: Study) -> None:
    file = next((study.output / "results").glob("*.parquet"))
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "cell", [["../../x"]]), file)
    with pytest.raises(BadInput, match=f"RUNS: row 1 of {file}: cell: "):
        read_results([study.output])


def test_results_of_other_code_are_kept_aloud(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    first, second = (cell.id for cell in study.cells)
    store = open_store(study, resume=True)
    store.keep(row(cell=first, versions='{"neuronal_ray": "0.1.0+new"}'))
    store.keep(row(cell=second, versions='{"neuronal_ray": "0.1.0+old"}'))
    again = open_store(study, resume=True)
    with caplog.at_level("WARNING"):
        again.warn_of_other_code(dict.fromkeys((first, second), "0.1.0+new"))
    assert caplog.messages == ["--resume: 1 results were made by 0.1.0+old and are kept; this is 0.1.0+new"]


def test_a_grid_is_counted_before_any_cell_is_made(tmp_path: Path) -> None:
    seeds = ", ".join(map(str, range(100)))
    grid = f"[grid]\nseed = [{seeds}]\nsearch-samples = [{seeds}]\ncalibration-samples = [{seeds}]\n"
    (tmp_path / "x.toml").write_text(f'[options]\nmodel = "some/model"\n{grid}')
    expected = r"1,000,000 cells \(100 x 100 x 100 x 1\), --max-cells allows 10,000"
    with pytest.raises(BadInput, match=expected):
        read_study(tmp_path / "x.toml", {}, output=tmp_path / "runs")
    (tmp_path / "x.toml").write_text(FILE)
    with pytest.raises(BadInput, match="2 cells"):
        read_study(tmp_path / "x.toml", {}, output=tmp_path / "runs", max_cells=1)
    assert len(read_study(tmp_path / "x.toml", {}, output=tmp_path / "runs", max_cells=2).cells) == 2
