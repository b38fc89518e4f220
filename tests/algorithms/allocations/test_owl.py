"""Does OWL give a block the density that its share of outlying scores asks for?"""

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronal_ray.algorithms.allocations import owl
from neuronal_ray.core.layout import Group, Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.problem import Problem
from neuronal_ray.core.stats import SquareSum

SHAPES = [("attention.query", 8, 8), ("mlp.up", 20, 8), ("mlp.down", 8, 20)]


class MadeUp:
    """A probe of random blocks: heavier tails in some, and a third of a block's linears in bfloat16."""

    def __init__(self, num_blocks: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.blocks = [[self.linear(block, *shape, generator) for shape in SHAPES] for block in range(num_blocks)]
        self.layout = Layout(tuple(linear.spec for linears in self.blocks for linear in linears))

    def linear(self, block: int, path: str, rows: int, columns: int, generator: torch.Generator) -> LinearData:
        spec = LinearSpec(
            linear=Linear(block, path), rows=rows, columns=columns, reads=Group(block, 0), consumer=None, sources=None
        )
        power = float(1 + 2 * torch.rand((), generator=generator))
        weight = torch.randn(rows, columns, generator=generator)
        weight = weight.sign() * weight.abs() ** power
        inputs = SquareSum.of(
            torch.randn(2, 5, columns, generator=generator) * torch.rand(columns, generator=generator)
        )
        return LinearData(spec=spec, weight=weight.bfloat16() if path == "mlp.up" else weight, inputs=inputs)

    def measure(self, function: Callable[[Sequence[LinearData]], Any]) -> list[Any]:
        function = pickle.loads(pickle.dumps(function))  # as on its way to another process
        return [function(linears) for linears in self.blocks]


def problem_of(probe: MadeUp, target: float, mode: str = "paper") -> Problem:
    return Problem(layout=probe.layout, target=target, mode=mode, probe=probe)


def literal_share(linears: Sequence[LinearData], threshold: float) -> float:
    scores = []
    for linear in linears:
        norm = linear.inputs.norm.tolist()
        for row in linear.weight.float().tolist():
            for weight, a in zip(row, norm, strict=True):
                scores.append(np.float32(abs(weight)) * np.float32(a))
    cut = torch.tensor(scores).mean() * threshold
    return sum(score > float(cut) for score in scores) / len(scores) * 100


def literal_rates(shares: list[float], lam: float, target: float) -> list[float]:
    low, high = min(shares), max(shares)
    if low == high:
        return [target] * len(shares)
    scaled = [(share - low) / (high - low) * 2 * lam for share in shares]
    return [1 - (value - sum(scaled) / len(scaled) + (1 - target)) for value in scaled]


def rates_by_block(probe: MadeUp, problem: Problem, **settings: float) -> list[float]:
    found = owl.allocate(problem, **settings).rates
    by_block = []
    for linears in probe.blocks:
        rates = torch.cat([found[linear.spec.linear] for linear in linears])
        assert rates.dtype == torch.float64
        assert bool((rates == rates[0]).all())
        by_block.append(float(rates[0]))
    return by_block


@pytest.mark.parametrize("threshold", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_share_is_the_percentage_of_scores_above_the_cut(seed: int, threshold: float) -> None:
    for linears in MadeUp(2, seed=seed).blocks:
        assert owl.outlier_share(linears, threshold=threshold) == literal_share(linears, threshold)


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = MadeUp(1, seed=1).blocks[0]
    whole = owl.outlier_share(linears, threshold=2.0)
    monkeypatch.setattr(owl, "_SLAB_SIZE", 17)  # two rows, or less than one
    assert 0 < whole < 100
    assert owl.outlier_share(linears, threshold=2.0) == whole


def test_a_score_equal_to_the_cut_is_no_outlier() -> None:
    linear = MadeUp(1, seed=0).blocks[0][0]
    ones = LinearData(spec=linear.spec, weight=torch.ones(8, 8), inputs=SquareSum.of(torch.ones(1, 1, 8)))
    assert owl.outlier_share([ones], threshold=1.0) == 0
    assert owl.outlier_share([ones], threshold=0.999) == 100


@settings(max_examples=30)
@given(st.integers(0, 50), st.integers(2, 5), st.floats(0, 0.3), st.floats(0.1, 0.9))
def test_rates_are_the_mapping_written_out(seed: int, num_blocks: int, lam: float, target: float) -> None:
    probe = MadeUp(num_blocks, seed=seed)
    wanted = literal_rates([literal_share(linears, 2.0) for linears in probe.blocks], lam, target)
    problem = problem_of(probe, target)
    assert rates_by_block(probe, problem, threshold=2.0, lam=lam) == pytest.approx(wanted, abs=1e-12)


def test_the_block_with_the_most_outliers_is_the_densest() -> None:
    probe = MadeUp(5, seed=3)
    shares = [owl.outlier_share(linears, threshold=2.0) for linears in probe.blocks]
    rates = rates_by_block(probe, problem_of(probe, 0.6), threshold=2.0)
    assert shares.index(max(shares)) == rates.index(min(rates))
    assert max(rates) - min(rates) == pytest.approx(0.16)


@pytest.mark.parametrize("target", [0.0, 0.05, 0.37, 0.8, 0.99])
def test_the_budget_is_exact_in_paper_mode(target: float) -> None:
    probe = MadeUp(4, seed=5)
    found = owl.allocate(problem_of(probe, target), threshold=2.0)
    found.plan.check(probe.layout)
    assert found.plan.total == round(target * probe.layout.prunable)


def test_rates_beyond_0_and_1_are_clipped_as_the_released_code_does() -> None:
    probe = MadeUp(4, seed=5)
    literal = literal_rates([literal_share(linears, 2.0) for linears in probe.blocks], 0.25, 0.1)
    assert min(literal) < 0
    found = rates_by_block(probe, problem_of(probe, 0.1, "authors"), threshold=2.0, lam=0.25)
    assert found == pytest.approx([0.01 if rate <= 0 else rate for rate in literal], abs=1e-12)
    literal = literal_rates([literal_share(linears, 2.0) for linears in probe.blocks], 0.25, 0.9)
    assert max(literal) > 1
    found = rates_by_block(probe, problem_of(probe, 0.9, "authors"), threshold=2.0, lam=0.25)
    assert found == pytest.approx([0.99 if rate >= 1 else rate for rate in literal], abs=1e-12)


def test_counts_are_floored_in_authors_mode() -> None:
    probe = MadeUp(3, seed=6)
    found = owl.allocate(problem_of(probe, 0.7, "authors"), threshold=2.0)
    for spec in probe.layout:
        wanted = [math.floor(spec.columns * rate) for rate in found.rates[spec.linear].tolist()]
        assert found.plan.removed[spec.linear].tolist() == wanted


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_equal_blocks_get_the_target(mode: str) -> None:
    probe = MadeUp(1, seed=7)
    other = [
        LinearData(
            spec=LinearSpec(
                linear=Linear(1, linear.spec.linear.path),
                rows=linear.spec.rows,
                columns=linear.spec.columns,
                reads=Group(1, 0),
                consumer=None,
                sources=None,
            ),
            weight=linear.weight,
            inputs=linear.inputs,
        )
        for linear in probe.blocks[0]
    ]
    probe.blocks.append(other)
    probe.layout = Layout(tuple(linear.spec for linears in probe.blocks for linear in linears))
    assert rates_by_block(probe, problem_of(probe, 0.7, mode)) == [0.7, 0.7]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    probe = MadeUp(3, seed=8)
    probe.blocks[1][2].weight[3, 4] = value
    with pytest.raises(ValueError, match="--model: NaN or infinite weights or activations in block 1"):
        owl.allocate(problem_of(probe, 0.7))


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"--set allocation\.threshold: .*expected a positive number"):
        owl.allocate(problem_of(MadeUp(2, seed=0), 0.7), threshold=threshold)


@pytest.mark.parametrize("lam", [-0.01, 1.01, math.nan])
def test_a_bad_width_is_refused(lam: float) -> None:
    with pytest.raises(ValueError, match=r"--set allocation\.lam: .*expected a number from 0 to 1"):
        owl.allocate(problem_of(MadeUp(2, seed=0), 0.7), lam=lam)
