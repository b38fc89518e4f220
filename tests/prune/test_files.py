"""Files beside the weights: what is written is read back, and a failed run leaves nothing."""

import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.plan import Plan, exact_plan
from neuronal_ray.prune.files import read_allocation, write_allocation

SIZES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=5)


def layout_of(sizes: list[tuple[int, int]]) -> Layout:
    """A block per pair of rows and columns."""
    return Layout(
        tuple(
            LinearSpec(
                linear=Linear(block, "mlp.up_proj"),
                rows=rows,
                columns=columns,
                reads=Group(block, 0),
                consumer=None,
                sources=None,
            )
            for block, (rows, columns) in enumerate(sizes)
        )
    )


def plan_of(layout: Layout, seed: int, target: float) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    rates = {spec.linear: torch.rand(spec.rows, generator=generator, dtype=torch.float64) for spec in layout}
    return exact_plan(layout, rates, target=target)


@given(sizes=SIZES, seed=st.integers(0, 2**31), target=st.floats(0, 1))
def test_a_saved_allocation_is_read_back_as_it_was(sizes: list[tuple[int, int]], seed: int, target: float) -> None:
    layout = layout_of(sizes)
    plan = plan_of(layout, seed, target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "allocation.parquet"
        write_allocation(path, layout, plan)
        assert read_allocation(path, layout, flag="--x").digest == plan.digest
        assert sum(pq.read_table(path)["pruned"].to_pylist()) == plan.total


def test_an_allocation_of_another_model_is_refused(tmp_path: Path) -> None:
    layout = layout_of([(3, 8), (2, 5)])
    write_allocation(tmp_path / "allocation.parquet", layout, plan_of(layout, 0, 0.5))
    with pytest.raises(BadInput, match="other linears"):
        read_allocation(tmp_path / "allocation.parquet", layout_of([(3, 8)]), flag="--x")
    with pytest.raises(BadInput, match="3 rows, the model 4"):
        read_allocation(tmp_path / "allocation.parquet", layout_of([(4, 8), (2, 5)]), flag="--x")
    (tmp_path / "text.parquet").write_text("no parquet")
    with pytest.raises(BadInput, match=r"text\.parquet cannot be read as Parquet"):
        read_allocation(tmp_path / "text.parquet", layout, flag="--x")
