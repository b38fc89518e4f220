"""Spread values have the requested width and mean."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.spread import SCHEDULES, block_schedule, spread

LEVELS = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12)
LAM = st.floats(0, 0.5)
MEAN = st.floats(0, 1)


def literal(levels: list[float], lam: float, mean: float) -> list[float]:
    """Min-max to [0, 2 lam], then shifted to the mean."""
    low, high = min(levels), max(levels)
    if low == high:
        return [mean] * len(levels)
    scaled = [(level - low) / (high - low) * 2 * lam for level in levels]
    return [rate - sum(scaled) / len(scaled) + mean for rate in scaled]


@given(LEVELS, LAM, MEAN)
def test_rates_are_the_scaled_and_shifted_levels(levels: list[float], lam: float, mean: float) -> None:
    rates = spread(torch.tensor(levels), lam=lam, mean=mean)
    assert rates.dtype == torch.float64
    assert rates.tolist() == pytest.approx(literal(levels, lam, mean), abs=1e-12)


@given(LEVELS, LAM, MEAN)
def test_the_mean_is_kept_and_the_width_is_two_lambda(levels: list[float], lam: float, mean: float) -> None:
    rates = spread(torch.tensor(levels), lam=lam, mean=mean).tolist()
    width = 0.0 if min(levels) == max(levels) else 2 * lam
    assert sum(rates) / len(rates) == pytest.approx(mean, abs=1e-12)
    assert max(rates) - min(rates) == pytest.approx(width, abs=1e-12)


@given(LEVELS, LAM)
def test_a_higher_level_never_gets_a_lower_rate(levels: list[float], lam: float) -> None:
    rates = spread(torch.tensor(levels), lam=lam, mean=0.5).tolist()
    by_level = [rate for _, rate in sorted(zip(levels, rates, strict=True))]
    assert by_level == sorted(by_level)


@pytest.mark.parametrize("level", [-3.0, 0.0, 7.5])
def test_equal_levels_give_the_mean_exactly(level: float) -> None:
    assert spread(torch.full((4,), level), lam=0.2, mean=0.7).tolist() == [0.7] * 4


def test_the_levels_are_left_alone() -> None:
    levels = torch.tensor([1.0, 2.0], dtype=torch.float64)
    spread(levels, lam=0.2, mean=0.7)
    assert levels.tolist() == [1.0, 2.0]


# -- schedules


def literal_schedule(kind: str, num_blocks: int, lam: float, mean: float) -> list[float]:
    """Levels between 0 and 1 for the blocks, then width and mean; needs two blocks."""
    last = num_blocks - 1
    level: dict[str, list[float]] = {
        "linear": [block / last for block in range(num_blocks)],
        "log": [math.log(1 + block) / math.log(num_blocks) for block in range(num_blocks)],
        "exp": [(num_blocks ** (block / last) - 1) / (num_blocks - 1) for block in range(num_blocks)],
    }
    return literal(level[kind], lam, mean)


@pytest.mark.parametrize("kind", SCHEDULES)
@given(st.integers(2, 50), LAM, MEAN)
def test_a_schedule_is_its_formula(kind: str, num_blocks: int, lam: float, mean: float) -> None:
    rates = block_schedule(kind, num_blocks, lam=lam, mean=mean)
    assert rates.dtype == torch.float64
    assert rates.tolist() == pytest.approx(literal_schedule(kind, num_blocks, lam, mean), abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
@given(st.integers(2, 50), st.floats(0.001, 0.5), MEAN)
def test_a_schedule_rises_by_two_lambda_and_keeps_the_mean(kind: str, num_blocks: int, lam: float, mean: float) -> None:
    rates = block_schedule(kind, num_blocks, lam=lam, mean=mean).tolist()
    assert all(low < high for low, high in itertools.pairwise(rates)), rates
    assert sum(rates) / num_blocks == pytest.approx(mean, abs=1e-12)
    assert rates[-1] - rates[0] == pytest.approx(2 * lam, abs=1e-12)


def test_log_rises_steeply_at_first_and_exp_at_last() -> None:
    steps = {kind: block_schedule(kind, 6, lam=0.1, mean=0.7).diff() for kind in SCHEDULES}
    assert bool((steps["log"].diff() < 0).all()), steps
    assert bool((steps["exp"].diff() > 0).all()), steps
    assert steps["linear"].tolist() == pytest.approx([0.04] * 5)


@given(st.integers(2, 24), st.integers(0, 23))
def test_exp_is_the_inverse_function_of_log(num_blocks: int, block: int) -> None:
    last = num_blocks - 1
    block = min(block, last)
    log, exp = (block_schedule(kind, num_blocks, lam=0.5, mean=0.0) for kind in ("log", "exp"))
    share = float(log[block] - log[0])  # of log's rise, after block / last of the way
    assert (num_blocks**share - 1) / last == pytest.approx(block / last, abs=1e-9)
    assert float(exp[block] - exp[0]) == pytest.approx((num_blocks ** (block / last) - 1) / last, abs=1e-12)


@given(st.integers(2, 50), st.sampled_from([0.01, 0.05, 0.2, 0.25]), st.sampled_from([0.6, 0.7, 0.8]))
def test_linear_is_the_released_codes_to_the_last_bit(num_blocks: int, lam: float, mean: float) -> None:
    levels = np.arange(num_blocks, dtype=np.float64)
    density = (levels - levels.min()) * (1 / (levels.max() - levels.min()) * lam * 2)
    density = density - np.mean(density) + (1 - mean)
    expected = [1 - value for value in density[::-1]]
    assert block_schedule("linear", num_blocks, lam=lam, mean=mean).tolist() == expected


@pytest.mark.parametrize("kind", SCHEDULES)
@given(LAM, MEAN)
def test_a_single_block_gets_the_mean(kind: str, lam: float, mean: float) -> None:
    assert block_schedule(kind, 1, lam=lam, mean=mean).tolist() == pytest.approx([mean], abs=1e-15)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(BadInput, match=r"^--schedule: unknown name 'cosine', expected one of: linear, exp, log$"):
        block_schedule("cosine", 4, lam=0.1, mean=0.7)
