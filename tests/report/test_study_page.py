"""The report on sweeps: its numbers, and its page in a browser without a network."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from results import row

import neuronal_ray.report.__main__
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.plan import exact_plan, uniform_rates
from neuronal_ray.report.curves import curves
from neuronal_ray.report.schemas import DENSE
from neuronal_ray.report.study_page import read_studies
from neuronal_ray.report.study_tables import lambda_table, ranked, result_tables, seconds_table, shown
from neuronal_ray.sweep.config import Study, read_study
from neuronal_ray.sweep.files import Planned, open_store

CHROMIUM = shutil.which("chromium")

FILE = """
title = "Top-ups <tiny>"
reproduces = ["table 3", "figure 1"]
[options]
model = "some/model"
[grid]
method = ["magnitude", "wanda"]
sparsity = [0.7]
seed = [0, 1]
[[variant]]
name = "Uniform"
allocation = "uniform"
[[variant]]
name = "OWL"
allocation = "owl"
[[variant]]
name = "NeuronAL"
allocation = "neuronal"
"""

VALUES = {"Uniform": 50.0, "OWL": 40.0, "NeuronAL": 30.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    (folder / "x.toml").write_text(FILE)
    study: Study = read_study(folder / "x.toml", {}, output=folder / "runs")
    store = open_store(study, resume=False)
    layout = Layout(
        tuple(
            LinearSpec(
                linear=Linear(block, "mlp.up_proj"),
                rows=8,
                columns=16,
                reads=Group(block, 0),
                consumer=None,
                sources=None,
            )
            for block in range(3)
        )
    )
    for cell in study.cells:
        config = cell.config
        slope = 0.0 if cell.variant == "Uniform" else 0.1
        rates = uniform_rates(layout, lambda block, slope=slope: 0.7 + slope * (block - 1))
        planned = Planned(plan=exact_plan(layout, rates, target=0.7), steps=(), seconds=1.0, search_seconds=0.5)
        store.keep_plan(cell.id, layout, planned)
        for evaluation in ("wikitext2", "rte"):
            perplexity = evaluation == "wikitext2"
            value = VALUES[cell.variant] + config.seed + (5 if config.method == "magnitude" else 0)
            store.keep(
                row(
                    cell=cell.id,
                    variant=cell.variant,
                    method=config.method,
                    allocation=config.allocation,
                    seed=config.seed,
                    evaluation=evaluation,
                    metric="perplexity" if perplexity else "accuracy",
                    value=value if perplexity else value / 100,
                    block_lambda=0.1 if cell.variant == "NeuronAL" else None,
                    config=json.dumps(cell.options()),
                )
            )
        store.publish(cell.id)
    dense = row(cell="dense-" + "1" * 12, variant=DENSE, method=DENSE, allocation=DENSE, sparsity=0.0, value=10.0)
    store.keep(dense)
    store.publish("dense-" + "1" * 12)
    return folder / "runs"


def test_tables_have_means_spreads_and_marks(runs: Path) -> None:
    perplexity, accuracy = result_tables(read_studies([runs]).rows)
    lines = dict(zip(perplexity.rows, perplexity.marks, strict=True))
    assert list(lines) == [(DENSE, ""), *((m, v) for m in ("magnitude", "wanda") for v in VALUES)]
    (best,) = lines["wanda", "NeuronAL"]
    (second,) = lines["wanda", "OWL"]
    (last,) = lines["wanda", "Uniform"]
    assert best is not None
    assert second is not None
    assert last is not None
    assert (best.text, best.value, best.rank) == ("30.50 \u00b1 0.71", 30.5, 1)
    assert (second.rank, last.rank) == (2, 0)
    (most,) = dict(zip(accuracy.rows, accuracy.marks, strict=True))["wanda", "Uniform"]
    assert most is not None
    assert (most.text, most.rank) == ("50.50 \u00b1 0.71", 1)  # more is better here


@pytest.mark.parametrize(
    ("values", "metric", "ranks"),
    [
        ([3.0, 1.0, 2.0, 4.0], "perplexity", [0, 1, 2, 0]),
        ([3.0, 1.0, 2.0, 3.0], "accuracy", [1, 0, 2, 1]),
        ([1.0, 1.0], "accuracy", [0, 0]),
        ([None, float("inf"), 2.0, 1.0], "perplexity", [0, 0, 2, 1]),
    ],
)
def test_ranks(values: list[float | None], metric: str, ranks: list[int]) -> None:
    assert ranked(values, metric) == ranks


@pytest.mark.parametrize(
    ("value", "metric", "text"),
    [
        (12.345, "perplexity", "12.35"),
        (228.04, "perplexity", "228.0"),
        (25300.0, "perplexity", "2.53e4"),
        (float("inf"), "perplexity", "overflow"),
        (0.5123, "accuracy", "51.23"),
    ],
)
def test_numbers_look_as_in_the_paper(value: float, metric: str, text: str) -> None:
    assert shown(value, metric) == text


def test_a_curve_is_drawn_over_an_option_that_varies_alone() -> None:
    lams = (0.01, 0.05, 0.1)
    rows = [
        row(
            cell=str(lam),
            allocation="neuronal",
            value=20 + lam,
            block_lambda=lam,
            config=json.dumps({"block_lambdas": [lam]}),
        )
        for lam in lams
    ]
    rows.append(row(cell="all", allocation="neuronal", value=20.05, block_lambda=0.05, variant="NeuronAL"))
    rows += [
        row(cell=f"s{n}", value=30 + n, search_samples=n, config=json.dumps({"search_samples": n})) for n in (1, 2)
    ]
    (curve,) = curves(rows)  # two values of search_samples are no curve
    assert curve.option == "block lambda"
    assert curve.points == tuple((lam, 20 + lam) for lam in lams)
    assert curve.selected == 0.05


def test_lambdas_and_seconds(runs: Path) -> None:
    rows = read_studies([runs]).rows
    lambdas, seconds = lambda_table(rows), seconds_table(rows)
    assert lambdas is not None
    assert seconds is not None
    assert len(lambdas.rows) == 4  # two methods, two seeds
    assert {mark.text for line in lambdas.marks for mark in line if mark is not None} == {"0.10"}
    assert {mark.text for line in seconds.marks for mark in line if mark is not None} == {"2.0"}


def test_markdown_has_every_table(runs: Path, tmp_path: Path) -> None:
    assert neuronal_ray.report.__main__.main([str(runs), "--output", str(tmp_path / "r.md")]) == 0
    text = (tmp_path / "r.md").read_text()
    assert "| wanda | NeuronAL | **30.50 \u00b1 0.71** |" in text
    assert "| wanda | OWL | <u>40.50 \u00b1 0.71</u> |" in text
    assert "The paper's Table 3 at 70 %" in text
    assert "21.5" in text  # Wanda with NeuronAL on LLaMA-7B


def test_the_page_is_self_contained(runs: Path, tmp_path: Path) -> None:
    assert neuronal_ray.report.__main__.main([str(runs), "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "Top-ups &lt;tiny&gt;" in page
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', page)
    assert "@import" not in page
    assert page.count("<details>") == 2 * 2 * 2  # plans of OWL and NeuronAL: methods, seeds
    assert 'class="tables"' in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_sorts_and_fits_a_phone_in_a_browser(runs: Path, tmp_path: Path) -> None:
    assert neuronal_ray.report.__main__.main([str(runs), "--output", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    script = """<script>
      const table = document.querySelector("table.sortable");
      const column = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent).join("|");
      const head = table.tHead.rows[0].cells[2];
      head.click(); const up = column();
      head.click(); const down = column();
      document.title = JSON.stringify({up, down, wide: document.documentElement.scrollWidth, sort: head.ariaSort});
    </script></body>"""
    (tmp_path / "probe.html").write_text(page.replace("</body>", script))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"]  # fmt: skip
    command = [str(CHROMIUM), *flags, "--window-size=500,900", "--dump-dom", (tmp_path / "probe.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", found)
    told = json.loads(title.replace("&quot;", '"'))
    numbers = [float(cell.split()[0]) for cell in told["up"].split("|")]
    assert numbers == sorted(numbers)
    assert told["down"] == "|".join(reversed(told["up"].split("|")))
    assert told["sort"] == "descending"
    assert told["wide"] <= 500


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["absent"], "RUNS"),
        (["{runs}", "--output", "r.pdf"], ".html nor .md"),
        (["{runs}", "--output", "absent/r.html"], "no directory"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    words: list[str],
    said: str,
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert neuronal_ray.report.__main__.main([word.format(runs=runs) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_an_overflow_is_shown_as_one() -> None:
    rows = [
        row(),
        row(cell="1", variant="OWL", value=None, problem="overflow"),
        row(cell="2", variant="DSnoT", value=20.0),
    ]
    (table,) = result_tables(rows)
    texts = {
        line[1]: marks[0].text for line, marks in zip(table.rows, table.marks, strict=True) if marks[0] is not None
    }
    assert texts == {"Uniform": "50.00", "OWL": "overflow", "DSnoT": "20.00"}


def test_each_window_start_has_a_table_of_its_own() -> None:
    rows = [
        row(cell=f"{number:012d}", variant=variant, value=value, window_start=start)
        for number, (variant, value, start) in enumerate(
            [("Uniform", 50.0, None), ("OWL", 40.0, "papers"), ("Uniform", 30.0, "bos"), ("OWL", 20.0, "bos")]
        )
    ]
    rows.append(row(cell="dense", variant=DENSE, method=DENSE, sparsity=0.0, value=10.0, window_start="bos"))
    tables = {table.start: table for table in result_tables(rows)}
    assert set(tables) == {"papers", "bos"}
    assert all(f"window start {start}" in table.title for start, table in tables.items())
    assert [marks[0].value for marks in tables["papers"].marks] == [50.0, 40.0]
    assert [marks[0].value for marks in tables["bos"].marks] == [10.0, 30.0, 20.0]
