"""The divergence equals its textbook formula, for small and large logits."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.divergence import divergences, log_probabilities


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    powers = [math.exp(value - top) for value in logits]
    return [power / sum(powers) for power in powers]


def divergence(dense: list[float], sparse: list[float]) -> float:
    """KL(p || q) in plain floats."""
    pairs = zip(softmax(dense), softmax(sparse), strict=True)
    return sum(p * math.log(p / q) for p, q in pairs if p > 0)


logits = st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5)


@given(dense=logits, sparse=logits)
def test_it_is_the_formula(dense: list[float], sparse: list[float]) -> None:
    (found,) = divergences(log_probabilities(torch.tensor([dense])), torch.tensor([sparse])).tolist()
    assert found == pytest.approx(divergence(dense, sparse), rel=1e-4, abs=2e-6)
    assert found >= 0


@given(dense=logits, shift=st.floats(-50, 50))
def test_equal_distributions_do_not_diverge(dense: list[float], shift: float) -> None:
    (found,) = divergences(log_probabilities(torch.tensor([dense])), torch.tensor([dense]) + shift).tolist()
    assert found < 2e-5


def test_positions_are_independent_and_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, sparse = torch.randn(2, 7, 50, generator=generator)
    found = divergences(log_probabilities(dense), sparse)
    assert found.dtype == torch.float64
    alone = [float(divergences(log_probabilities(dense[i : i + 1]), sparse[i : i + 1])) for i in range(7)]
    assert found.tolist() == pytest.approx(alone, rel=1e-12)


def test_small_divergences_keep_their_digits() -> None:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(64, 1000, generator=generator)
    sparse = dense + 1e-2 * torch.randn(64, 1000, generator=generator)
    exact = torch.nn.functional.kl_div(
        sparse.double().log_softmax(-1), dense.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    assert divergences(log_probabilities(dense), sparse).sum() == pytest.approx(float(exact.sum()), rel=1e-3)


def test_half_precision_logits_are_widened_first() -> None:
    generator = torch.Generator().manual_seed(2)
    dense, sparse = torch.randn(2, 3, 20, generator=generator).bfloat16()
    narrow = divergences(log_probabilities(dense), sparse)
    assert torch.equal(narrow, divergences(log_probabilities(dense.float()), sparse.float()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_overflow_is_not_a_number_of_nats(value: float) -> None:
    sparse = torch.zeros(1, 4)
    sparse[0, 1] = value
    assert not divergences(log_probabilities(torch.zeros(1, 4)), sparse).isfinite().all()
