"""Do spread levels have the width and the mean that they are asked for?"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.spread import linear_schedule, spread

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


@given(st.integers(2, 50), st.floats(0.001, 0.5), MEAN)
def test_the_schedule_rises_in_equal_steps_from_mean_minus_to_mean_plus_lambda(
    num_blocks: int, lam: float, mean: float
) -> None:
    rates = linear_schedule(num_blocks, lam=lam, mean=mean).tolist()
    wanted = [mean - lam + 2 * lam * block / (num_blocks - 1) for block in range(num_blocks)]
    assert rates == pytest.approx(wanted, abs=1e-12)
    assert rates == sorted(rates)


@given(LAM, MEAN)
def test_a_single_block_gets_the_mean(lam: float, mean: float) -> None:
    assert linear_schedule(1, lam=lam, mean=mean).tolist() == pytest.approx([mean], abs=1e-15)
