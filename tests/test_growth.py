"""Does the growth of a search come out as its exponents, and do table and plots show what was measured?"""

from pathlib import Path

import pytest

from neuronal_ray.benchmark.growth import Case, Ranges, measure_growth
from neuronal_ray.report.growth import Series, growth_table, slope, write_growth_plots

pytestmark = pytest.mark.usefixtures("one_thread")

SERIES = Series(
    name="tokens", values=(8, 16, 32), search_s=(3.0, 6.0, 12.0), floor_s=(1.0, 4.0, 16.0), num_bytes=(2**20,) * 3
)


def test_a_slope_is_the_exponent() -> None:
    assert slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert (SERIES.search_slope, SERIES.floor_slope) == (pytest.approx(1.0), pytest.approx(2.0))
    assert SERIES.bytes_slope == pytest.approx(0.0)


def test_the_table_and_the_plots_are_written(tmp_path: Path) -> None:
    header, rule, row = growth_table([SERIES])
    assert header.count("|") == rule.count("|") == row.count("|")
    assert "3.00, 6.00, 12.00 s" in row
    assert "1.00, 2.00, " in row.split("|")[-2]
    svg, png = write_growth_plots([SERIES, SERIES], tmp_path)
    assert svg.read_text().count("<svg") == 1
    assert png.read_bytes()[1:4] == b"PNG"
    first = svg.read_bytes()
    write_growth_plots([SERIES, SERIES], tmp_path)
    assert svg.read_bytes() == first


def test_memory_and_work_grow_with_what_is_varied(tmp_path: Path) -> None:
    base = Case(blocks=2, hidden=32, lambdas=2, samples=1, length=16)
    ranges = Ranges(base=base, blocks=(2, 3), hidden=(32, 64), lambdas=(2, 3), samples=(1, 2), workers=())
    notes: list[str] = []
    measured = measure_growth(ranges, device="cpu", threads=1, rounds=1, advance=notes.append)
    assert len(notes) == len(set(notes)) == len(ranges.cases) == 5
    found = {one.name: one for one in measured.series}
    assert found["candidates"].values == (4, 6), "the row step's lambda 0 is the block step's winner"
    assert found["tokens"].values == (16, 32)
    for name in ("blocks", "hidden size", "tokens"):
        small, large = found[name].num_bytes
        assert small < large, name
    assert all(spent > 0 for one in found.values() for spent in (*one.search_s, *one.floor_s))
