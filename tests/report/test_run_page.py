"""The page of a run: complete, equal to its three files, self-contained, and the same every time."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.report.__main__ import main
from neuronal_ray.report.inputs import read_run
from neuronal_ray.report.run_page import run_page, write_report

PATHS = {
    "self_attn.q_proj": (48, 48),
    "self_attn.k_proj": (16, 48),
    "self_attn.v_proj": (16, 48),
    "self_attn.o_proj": (48, 48),
    "mlp.gate_proj": (128, 48),
    "mlp.up_proj": (128, 48),
    "mlp.down_proj": (48, 128),
}
TARGET = 0.7
LAMBDAS = {
    "block": [0.01, 0.02, 0.03, 0.05, 0.06, 0.07, 0.08, 0.09, 0.1, 0.12, 0.15, 0.2, 0.25],
    "row": [0.0, 0.02, 0.04, 0.08, 0.16],
}
SELECTED = {"block": 0.12, "row": 0.04}
VOID = {"meta", "br", "link", "img", "hr"}


class Page(HTMLParser):
    """Collects text, tags and ids; raises AssertionError for a tag that is not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids.extend(value for name, value in attrs if name == "id" and value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def write_example(
    directory: Path, *, num_blocks: int = 4, steps: Sequence[str] = ("block", "row"), **changes: Any
) -> dict[str, Any]:
    """The three files of a run with a made-up outcome; `changes` replace keys of pruning.json."""
    generator = np.random.default_rng(0)
    linears: list[dict[str, Any]] = []
    for block in range(num_blocks):
        rate = TARGET - 0.08 + 0.16 * (block + 0.5) / num_blocks
        for number, (path, (rows, columns)) in enumerate(PATHS.items()):
            noise = 0.02 * generator.standard_normal(rows) + 0.004 * (number - 3)
            row_pruned = np.rint(np.clip(rate + noise, 0, 1) * columns).astype(np.int32)
            size = {"rows": rows, "columns": columns, "pruned": int(row_pruned.sum())}
            linears.append({"block": block, "path": path, **size, "row_pruned": row_pruned})
    candidates: list[dict[str, Any]] = [
        {
            "step": step,
            "lambda": lam,
            "criterion": "alignment",
            "score": 0.31 + 4 * (lam - SELECTED[step]) ** 2 - 0.02 * (step == "row"),
            "selected": lam == SELECTED[step],
            "seconds": 3.2 + lam,
        }
        for step in steps
        for lam in LAMBDAS[step]
    ]
    pruned, prunable = (sum(row["pruned"] for row in linears), sum(row["rows"] * row["columns"] for row in linears))
    document = {
        "format": 1,
        "model": "example/llama-tiny",
        "method": "wanda",
        "allocation": "neuronal",
        "row_step": None,
        "refinement": "none",
        "pattern": "unstructured",
        "mode": "paper",
        "sparsity": {"target": TARGET, "achieved": pruned / prunable, "pruned": pruned, "prunable": prunable},
        "search": {
            step: {
                "selected": SELECTED[step],
                "candidates": [
                    {"lambda": row["lambda"], "alignment": row["score"]} for row in candidates if row["step"] == step
                ],
                "seconds": 41.25,
            }
            for step in steps
        },
        "calibration": {
            "source": "c4",
            "samples": 128,
            "search_samples": 8,
            "sequence_length": 2048,
            "seed": 0,
            "sha256": "b5bb9d8014a0f9b1d61e21e796d78dccdf1352f23cd32812f4850b878ae4944c",
        },
        "evaluation": {
            "wikitext2": {
                "perplexity": 21.487,
                "windows": 141,
                "sequence_length": 2048,
                "dense": {"perplexity": 5.678},
                "uniform": {"perplexity": 24.912},
                "block": {"perplexity": 22.354},
            },
            "ptb": {
                "perplexity": 1234.5,
                "windows": 60,
                "sequence_length": 2048,
                "dense": {"perplexity": 27.34},
                "uniform": {"perplexity": None},
                "block": {"perplexity": 1301.75},
            },
        },
        "seconds": {
            "loading": 12.5,
            "statistics": 31.75,
            "ranking": 4.0,
            "block search": 41.25,
            "row search": 17.5,
            "wikitext2: pruned": 22.0,
            "checkpoint": 9.125,
        },
        "versions": {"neuronal_ray": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        "devices": ["NVIDIA H200", "NVIDIA H200"],
        "config": {
            "model": "example/llama-tiny",
            "sparsity": TARGET,
            "block_lambdas": LAMBDAS["block"],
            "dtype": "auto",
        },
    }
    document |= changes
    (directory / "pruning.json").write_text(json.dumps(document))
    allocation = pa.schema(
        {
            "block": pa.int32(),
            "path": pa.string(),
            "rows": pa.int32(),
            "columns": pa.int32(),
            "pruned": pa.int64(),
            "row_pruned": pa.list_(pa.int32()),
        }
    )
    search = pa.schema(
        {
            "step": pa.string(),
            "lambda": pa.float64(),
            "criterion": pa.string(),
            "score": pa.float64(),
            "selected": pa.bool_(),
            "seconds": pa.float64(),
        }
    )
    pq.write_table(pa.Table.from_pylist(linears, schema=allocation), directory / "allocation.parquet")
    pq.write_table(pa.Table.from_pylist(candidates, schema=search), directory / "search.parquet")
    return document


def report_of(directory: Path, **changes: Any) -> Page:
    write_example(directory, **changes)
    return Page(write_report(directory).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("example")
    write_example(directory)
    return write_report(directory).read_text(encoding="utf-8")


def test_page_says_what_the_files_say(html: str) -> None:
    page = Page(html)
    expected = ["example/llama-tiny", "wanda", "neuronal", "target 70%", "5.68", "21.49", "\u00d7 3.78", "24.91"]
    expected += [
        "1,234.50",
        "overflow",
        "wikitext2: 141 windows of 2,048 tokens",
        "128",
        "b5bb9d80",
        "2.13.0",
        "2 \u00d7 NVIDIA H200",
    ]
    expected += ["138.1", "\u03bb = 0.12 of 13 candidates, in 41.2 s", "\u03bb = 0.04 of 5 candidates"]
    absent = [text for text in expected if text not in page.text]
    assert not absent, f"{absent} not in the page"
    assert page.tags.count("svg") == 6, "two search figures, blocks and rows each wide and narrow"
    assert "There was no search" not in page.text


def test_all_candidates_are_listed_and_the_selected_marked(html: str) -> None:
    rows = re.findall(r'<tr( class="chosen")?><th[^>]*>(block|row)</th><td>([^<]*)</td>', html)
    assert [(step, float(lam)) for _, step, lam in rows] == [(step, lam) for step in LAMBDAS for lam in LAMBDAS[step]]
    assert {step: float(lam) for mark, step, lam in rows if mark} == SELECTED


def test_ids_are_unique_and_references_resolve(html: str) -> None:
    page = Page(html)
    twice = {name for name in page.ids if page.ids.count(name) > 1}
    assert not twice, f"ids used twice: {sorted(twice)[:5]}"
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert used
    assert used <= set(page.ids), f"ids that do not exist: {sorted(used - set(page.ids))[:5]}"


def test_page_needs_nothing_from_outside(html: str) -> None:
    page = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.findall(r".*https?://.*", page)
    assert not re.findall(r".*(?:@import|url\((?!#)|\bsrc=|data:).*", page)
    assert not {"script", "link", "img", "image", "iframe"} & set(Page(html).tags)


def test_figures_take_their_colors_from_the_page(html: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    fixed = {color for svg in svgs for color in re.findall(r"(?:fill|stroke): (#\w+)", svg)}
    assert not fixed, f"colors that do not follow the theme: {fixed}"


def test_the_same_files_give_the_same_bytes(tmp_path: Path, html: str) -> None:
    write_example(tmp_path)
    command = [sys.executable, "-m", "neuronal_ray.report", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).parents[2])
    assert (tmp_path / "report.html").read_bytes() == html.encode()


def test_strings_are_escaped(tmp_path: Path) -> None:
    name = "<script>alert('x')</script> & co"
    page = report_of(
        tmp_path, model=name, method=name, devices=[name], config={name: name}, seconds={name: 1.0}, mode=name
    )
    assert "script" not in page.tags
    assert page.text.count(name) == 8, page.text


HOSTILE = "<script>alert('x')</script>$\\frac{$ & \"quoted\" {0} ../x \x00\n"


def test_hostile_text_in_every_field_stays_text(tmp_path: Path) -> None:
    """Names of steps, texts, plans, stages and linears, too: the page has no tag that the code did not write."""
    document = write_example(tmp_path)
    usual = set(Page(write_report(tmp_path).read_text(encoding="utf-8")).tags)

    ours = (
        "perplexity",
        "windows",
        "sequence_length",
        "dense",
        "selected",
        "noun",
        "candidates",
        "sparsity",
        "seconds",
    )

    def hostile(value: Any, *, keys: bool = False) -> Any:
        if isinstance(value, dict):
            return {
                f"{key}{HOSTILE}" if keys and key not in ours else key: hostile(entry, keys=key != "sparsity")
                for key, entry in value.items()
            }
        if isinstance(value, list):
            return [hostile(entry) for entry in value]
        return f"{value}{HOSTILE}" if isinstance(value, str) else value

    (tmp_path / "pruning.json").write_text(json.dumps(hostile(document)))
    for name, columns in (("search.parquet", ("step", "criterion")), ("allocation.parquet", ("path",))):
        table = pq.read_table(tmp_path / name)
        rows = [{k: f"{v}{HOSTILE}" if k in columns else v for k, v in row.items()} for row in table.to_pylist()]
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / name)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags
    assert set(page.tags) == usual, set(page.tags) ^ usual
    assert page.text.count("<script>alert('x')</script>$\\frac{$ & \"quoted\" {0} ../x") > 60
    assert len(page.ids) == len(set(page.ids))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@st.composite
def mutations(draw: st.DrawFn, value: Any) -> Any:
    """`value` with something in it replaced, removed or added."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 5)):
        changed = value.copy()
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        if draw(st.integers(0, 6)):
            changed[key] = draw(mutations(value[key]))
        else:
            del changed[key]
        return changed
    return draw(JSON)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    directory = tmp_path_factory.mktemp("mutated")
    return directory, write_example(directory, num_blocks=1)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_pruning_json_gives_a_page_or_one_line(
    example: tuple[Path, dict[str, Any]], data: st.DataObject
) -> None:
    directory, document = example
    (directory / "pruning.json").write_text(json.dumps(data.draw(mutations(document))))
    message = ""
    try:
        html = run_page(read_run(directory))
    except BadInput as error:
        html, message = "", str(error)
    assert bool(html) != message.startswith("RUNS: "), message
    assert "\n" not in message
    assert "script" not in Page(html).tags


@pytest.mark.parametrize("steps", [(), ("block",), ("row",), ("block", "row")])
def test_only_the_steps_in_the_files_are_shown(tmp_path: Path, steps: Sequence[str]) -> None:
    page = report_of(tmp_path, steps=steps)
    assert ("There was no search" in page.text) == (not steps)
    assert re.findall(r"(Block|Row) step:", page.text) == [step.capitalize() for step in steps]
    assert page.tags.count("svg") == 4 + len(steps)


def test_a_step_whose_candidates_have_numbers_is_shown_by_number(tmp_path: Path) -> None:
    document = write_example(tmp_path, steps=("block",))
    document["search"]["block"]["noun"] = "candidate"
    (tmp_path / "pruning.json").write_text(json.dumps(document))
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "Block step: candidate 0.12 of 13, in 41.2 s" in page.text
    assert "\u03bb =" not in page.text


def test_no_evaluation(tmp_path: Path) -> None:
    assert "The model was not evaluated." in report_of(tmp_path, num_blocks=1, steps=(), evaluation={}).text


@pytest.mark.parametrize("num_blocks", [1, 80])
def test_any_number_of_blocks(tmp_path: Path, num_blocks: int) -> None:
    page = report_of(tmp_path, num_blocks=num_blocks, devices=[], versions={}, seconds={})
    assert f"{num_blocks * len(PATHS)} linears" in page.text
    size = (tmp_path / "report.html").stat().st_size
    assert size < 1_000_000, f"{size} bytes"


@pytest.mark.parametrize(
    ("pruned", "achieved", "sentence"),
    [
        (7_000_000, 0.7, "sparsity, exact to the weight"),
        (7_000_001, 0.7000001, "sparsity, +0.000 points from the target"),
        (6_980_000, 0.698, "sparsity, -0.200 points from the target"),
    ],
)
def test_sparsity_is_compared_to_the_weight(tmp_path: Path, pruned: int, achieved: float, sentence: str) -> None:
    counts = {"target": 0.7, "achieved": achieved, "pruned": pruned, "prunable": 10_000_000}
    page = report_of(tmp_path, num_blocks=1, steps=(), sparsity=counts)
    assert sentence in page.text
    assert f"the saved tensors hold {pruned:,} zeros" in page.text


def test_uniform_allocation_has_figures_too(tmp_path: Path) -> None:
    document = write_example(tmp_path, steps=(), num_blocks=2)
    table = pq.read_table(tmp_path / "allocation.parquet").to_pylist()
    for row in table:
        row["row_pruned"] = [round(TARGET * row["columns"])] * row["rows"]
        row["pruned"] = sum(row["row_pruned"])
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "allocation.parquet")  # int64: cast on reading
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 4, document["search"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pruning.json", None, "no pruning.json in"),
        ("search.parquet", None, "no search.parquet in"),
        ("pruning.json", b"{", "pruning.json: not JSON"),
        ("pruning.json", b"\xff\xfe", "is not UTF-8 text"),
        ("pruning.json", b"[]", 'expected an object with "format": 1'),
        ("pruning.json", b'{"format": 3}', 'expected an object with "format": 1'),
        ("pruning.json", b'{"format": 1, "sparsity": 0.7}', "model is missing"),
        ("allocation.parquet", b"PAR1", "allocation.parquet cannot be read"),
    ],
)
def test_bad_files_end_with_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    write_example(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "RUNS: " in error
    assert str(tmp_path) in error
    assert message in error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("allocation.parquet", "pruned", None, "lacks the column pruned"),
        ("allocation.parquet", "block", ["x"] * 28, "the column block is string, expected int32"),
        ("allocation.parquet", "path", [None] * 28, "has nulls in the column path"),
        ("allocation.parquet", "pruned", [1] * 28, "expected 48 rows that lost 1"),
        ("allocation.parquet", "columns", [1] * 28, "lost more weights than a row has"),
        ("search.parquet", "selected", [False] * 18, "selects none in the block step, expected 0.12"),
    ],
)
def test_bad_tables_are_refused(tmp_path: Path, name: str, column: str, value: list[Any] | None, message: str) -> None:
    write_example(tmp_path)
    table = pq.read_table(tmp_path / name)
    place = table.column_names.index(column)
    table = table.remove_column(place) if value is None else table.set_column(place, column, pa.array(value))
    pq.write_table(table, tmp_path / name)
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_example(tmp_path)
    (tmp_path / "report.html").write_text("old")
    before = sorted(tmp_path.iterdir())

    def full(source: Path, destination: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_writing_leaves_only_the_report(tmp_path: Path) -> None:
    write_example(tmp_path)
    before = set(tmp_path.iterdir())
    write_report(tmp_path)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "report.html"}


def test_importing_is_light() -> None:
    code = (
        "import sys, neuronal_ray.report\n"
        "heavy = {'matplotlib', 'numpy', 'pyarrow', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
