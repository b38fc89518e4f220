"""Does DLP find the median score of a block, and does a lower one make the block denser?"""

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronal_ray.algorithms.allocations import dlp
from neuronal_ray.core.layout import Group, Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.problem import Problem
from neuronal_ray.core.stats import SquareSum

SHAPES = [("attention.query", 8, 8), ("mlp.up", 21, 8), ("mlp.down", 7, 21)]


def weighed(block: int, path: str, weight: torch.Tensor, inputs: SquareSum) -> LinearData:
    rows, columns = weight.shape
    spec = LinearSpec(
        linear=Linear(block, path), rows=rows, columns=columns, reads=Group(block, 0), consumer=None, sources=None
    )
    return LinearData(spec=spec, weight=weight, inputs=inputs)


def linear_of(weight: torch.Tensor, *, block: int = 0, path: str = "only") -> LinearData:
    """A linear whose inputs' norm is 1 everywhere."""
    return weighed(block, path, weight, SquareSum.of(torch.ones(1, 1, weight.shape[1])))


class MadeUp:
    """A probe of random blocks of different scale, a third of a block's linears in float16."""

    def __init__(self, num_blocks: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.blocks = []
        for block in range(num_blocks):
            linears = []
            for path, rows, columns in SHAPES:
                weight = torch.randn(rows, columns, generator=generator) * torch.rand((), generator=generator)
                inputs = SquareSum.of(torch.randn(2, 5, columns, generator=generator))
                linears.append(weighed(block, path, weight.half() if path == "mlp.up" else weight, inputs))
            self.blocks.append(linears)
        self.layout = Layout(tuple(linear.spec for linears in self.blocks for linear in linears))

    def measure(self, function: Callable[[Sequence[LinearData]], Any]) -> list[Any]:
        function = pickle.loads(pickle.dumps(function))  # as on its way to another process
        return [function(linears) for linears in self.blocks]


def problem_of(probe: MadeUp, target: float, mode: str = "paper") -> Problem:
    return Problem(layout=probe.layout, target=target, mode=mode, probe=probe)


def literal_median(linears: Sequence[LinearData]) -> float:
    scores = []
    for linear in linears:
        norm = linear.inputs.norm.tolist()
        for row in linear.weight.float().tolist():
            scores += [float(np.float32(abs(weight)) * np.float32(a)) for weight, a in zip(row, norm, strict=True)]
    return sorted(scores)[(len(scores) - 1) // 2]


def literal_rates(medians: list[float], alpha: float, target: float) -> list[float]:
    importance = [1 - median / sum(medians) for median in medians]
    low, high = min(importance), max(importance)
    scaled = [(value - low) / (high - low) * 2 * alpha for value in importance]
    return [1 - (value - sum(scaled) / len(scaled) + (1 - target)) for value in scaled]


def rates_by_block(probe: MadeUp, target: float, **settings: float) -> list[float]:
    found = dlp.allocate(problem_of(probe, target), **settings).rates
    by_block = []
    for linears in probe.blocks:
        rates = torch.cat([found[linear.spec.linear] for linear in linears])
        assert rates.dtype == torch.float64
        assert bool((rates == rates[0]).all())
        by_block.append(float(rates[0]))
    return by_block


@pytest.mark.parametrize("seed", range(8))
def test_the_median_is_that_of_all_scores_of_the_block(seed: int) -> None:
    for linears in MadeUp(2, seed=seed).blocks:
        assert dlp.median_score(linears) == literal_median(linears)


@given(st.lists(st.floats(-(2.0**127), 2.0**127, width=32), min_size=1, max_size=40))
def test_the_median_is_exact_whatever_the_magnitudes(values: list[float]) -> None:
    assert dlp.median_score([linear_of(torch.tensor([values]))]) == float(torch.tensor(values).abs().median())


@pytest.mark.parametrize("values", [[0.0], [2.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 5.0], [1.0, 1.0000001, 1.0000002]])
def test_of_an_even_number_the_lower_of_the_middle_two_counts(values: list[float]) -> None:
    wanted = sorted(torch.tensor(values).tolist())[(len(values) - 1) // 2]
    assert dlp.median_score([linear_of(torch.tensor([values]))]) == wanted


def test_slabs_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = MadeUp(1, seed=1).blocks[0]
    whole = dlp.median_score(linears)
    monkeypatch.setattr(dlp, "_SLAB_SIZE", 17)  # two rows, or less than one
    assert dlp.median_score(linears) == whole


@settings(max_examples=30)
@given(st.integers(0, 50), st.integers(2, 5), st.floats(0, 0.3), st.floats(0.1, 0.9))
def test_rates_are_the_mapping_written_out(seed: int, num_blocks: int, alpha: float, target: float) -> None:
    probe = MadeUp(num_blocks, seed=seed)
    wanted = literal_rates([literal_median(linears) for linears in probe.blocks], alpha, target)
    assert rates_by_block(probe, target, alpha=alpha) == pytest.approx(wanted, abs=1e-9)


def test_the_block_with_the_highest_median_is_the_sparsest() -> None:
    probe = MadeUp(5, seed=3)
    medians = [literal_median(linears) for linears in probe.blocks]
    rates = rates_by_block(probe, 0.6)
    assert medians.index(max(medians)) == rates.index(max(rates))
    assert max(rates) - min(rates) == pytest.approx(0.3)


@pytest.mark.parametrize("target", [0.0, 0.05, 0.37, 0.8, 0.99])
def test_the_budget_is_exact(target: float) -> None:
    probe = MadeUp(4, seed=5)
    found = dlp.allocate(problem_of(probe, target))
    found.plan.check(probe.layout)
    assert found.plan.total == round(target * probe.layout.prunable)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_equal_medians_give_the_target(value: float) -> None:
    probe = MadeUp(0, seed=0)
    probe.blocks = [[linear_of(torch.full((4, 6), value), block=block)] for block in range(3)]
    probe.layout = Layout(tuple(linear.spec for linears in probe.blocks for linear in linears))
    assert rates_by_block(probe, 0.7) == pytest.approx([0.7] * 3, abs=1e-15)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_a_single_weight_that_is_not_finite_is_refused(value: float) -> None:
    probe = MadeUp(3, seed=8)
    probe.blocks[1][2].weight[3, 4] = value
    with pytest.raises(ValueError, match="--model: NaN or infinite weights or activations in block 1"):
        dlp.allocate(problem_of(probe, 0.7))


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan])
def test_a_bad_width_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=r"--set allocation\.alpha: .*expected a number from 0 to 1"):
        dlp.allocate(problem_of(MadeUp(2, seed=0), 0.7), alpha=alpha)
