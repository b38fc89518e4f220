"""The misalignment of equation 2 depends on the shape of the norms, not on their scale."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.alignment import misalignments, normalized, total_misalignment

NORMS = st.floats(0, 1000, width=32)
POSITIVE = st.floats(0.125, 1000, width=32)


def misalignment(dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
    """Of one input."""
    return misalignments(dense[None], sparse[None])[0]


def literal(dense: list[float], sparse: list[float]) -> float:
    """|| dense / sum(dense) - sparse / sum(sparse) || / number of features."""
    shares = [[norm / sum(norms) if sum(norms) > 0 else 0.0 for norm in norms] for norms in (dense, sparse)]
    return math.sqrt(sum((one - other) ** 2 for one, other in zip(*shares, strict=True))) / len(dense)


@given(st.lists(st.tuples(NORMS, NORMS), min_size=1, max_size=10))
def test_a_term_is_the_distance_of_the_normalized_norms_over_their_number(pairs: list[tuple[float, float]]) -> None:
    dense, sparse = (list(norms) for norms in zip(*pairs, strict=True))
    found = misalignment(torch.tensor(dense), torch.tensor(sparse))
    assert found.dtype == torch.float64
    assert float(found) == pytest.approx(literal(dense, sparse), rel=1e-9, abs=1e-15)


@given(st.lists(POSITIVE, min_size=1, max_size=10), st.sampled_from([0.25, 2.0, 1024.0]))
def test_scale_does_not_matter(norms: list[float], scale: float) -> None:
    dense = torch.tensor(norms)
    assert float(misalignment(dense, dense * scale)) == 0


def test_equal_norms_are_aligned_exactly_and_swapped_ones_are_not() -> None:
    dense = torch.tensor([1.0, 3.0])
    assert float(misalignment(dense, dense)) == 0
    assert float(misalignment(dense, dense.flip(0))) == pytest.approx(math.sqrt(0.5) / 2)


def test_a_dead_input_normalizes_to_zeros() -> None:
    assert normalized(torch.zeros(1, 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert float(misalignment(torch.tensor([1.0, 1.0]), torch.zeros(2))) == pytest.approx(math.sqrt(0.5) / 2)


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**31))
def test_inputs_of_one_batch_have_the_bits_that_each_has_alone(inputs: int, columns: int, seed: int) -> None:
    dense, sparse = torch.rand(2, inputs, columns, generator=torch.Generator().manual_seed(seed))
    together = misalignments(dense, sparse)
    for number in range(inputs):
        assert misalignment(dense[number], sparse[number]) == together[number], number


def test_an_overflow_is_no_finite_score() -> None:
    overflowed = torch.tensor([1.0, math.inf])
    assert not math.isfinite(float(misalignment(torch.tensor([1.0, 1.0]), overflowed)))


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 4)), min_size=1, max_size=8))
def test_the_total_counts_a_term_once_per_linear_that_shares_the_input(terms: list[tuple[float, int]]) -> None:
    values, readers = (list(part) for part in zip(*terms, strict=True))
    found = total_misalignment(torch.tensor(values, dtype=torch.float64), readers)
    assert found == pytest.approx(sum(term * count for term, count in terms), rel=1e-12, abs=1e-15)
