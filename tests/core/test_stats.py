"""Are input statistics the norms they say, however the text is cut into chunks?"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.stats import RunningNorm, SquareSum

SHAPES = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))


def inputs_of(shape: tuple[int, int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[sequences, tokens, columns]."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def literal_norm(inputs: torch.Tensor) -> list[float]:
    """sqrt(sum over tokens of x^2 / number of sequences), feature by feature."""
    sequences = inputs.tolist()
    return [
        math.sqrt(sum(token[column] ** 2 for sequence in sequences for token in sequence) / len(sequences))
        for column in range(inputs.shape[2])
    ]


def of_chunks(inputs: torch.Tensor, chunk: int) -> SquareSum:
    first, *others = [SquareSum.of(part) for part in inputs.split(chunk)]
    for other in others:
        first = first.merge(other)
    return first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_the_norm_is_the_root_of_the_squares_over_sequences(
    shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    inputs = inputs_of(shape, seed, dtype)
    found = SquareSum.of(inputs)
    assert found.sequences == shape[0]
    assert found.norm.dtype == torch.float32
    assert found.norm.tolist() == pytest.approx(literal_norm(inputs), rel=1e-6)


@given(SHAPES, st.integers(1, 6), st.integers(0, 1000))
def test_merged_chunks_are_the_whole_text(shape: tuple[int, int, int], chunk: int, seed: int) -> None:
    inputs = inputs_of(shape, seed)
    merged, whole = of_chunks(inputs, chunk), SquareSum.of(inputs)
    assert merged.sequences == whole.sequences == shape[0]
    assert merged.total.dtype == torch.float64
    torch.testing.assert_close(merged.total, whole.total, rtol=1e-6, atol=0)
    torch.testing.assert_close(merged.norm, whole.norm, rtol=1e-6, atol=0)


@given(st.integers(0, 1000))
def test_merging_is_associative_up_to_rounding(seed: int) -> None:
    a, b, c = (SquareSum.of(inputs_of((sequences, 3, 4), seed + sequences)) for sequences in (1, 2, 3))
    left, right = a.merge(b).merge(c), a.merge(b.merge(c))
    assert left.sequences == right.sequences == 6
    torch.testing.assert_close(left.total, right.total, rtol=1e-15, atol=0)


def test_merging_changes_neither_statistic() -> None:
    a, b = SquareSum.of(inputs_of((1, 3, 4))), SquareSum.of(inputs_of((2, 3, 4)))
    before = a.total.clone(), b.total.clone()
    a.merge(b)
    assert torch.equal(a.total, before[0])
    assert torch.equal(b.total, before[1])
    assert (a.sequences, b.sequences) == (1, 2)


def test_half_precision_squares_do_not_overflow() -> None:
    inputs = torch.full((1, 4, 2), 60_000.0, dtype=torch.float16)  # its square is beyond float16
    assert SquareSum.of(inputs).norm.tolist() == pytest.approx([2 * float(inputs[0, 0, 0])] * 2)


@given(SHAPES, st.integers(0, 1000))
def test_the_running_norm_is_the_same_number(shape: tuple[int, int, int], seed: int) -> None:
    inputs = inputs_of(shape, seed)
    first, *others = [RunningNorm.of(sequence[None]) for sequence in inputs]
    for other in others:
        first = first.merge(other)
    assert first.sequences == shape[0]
    torch.testing.assert_close(first.norm, SquareSum.of(inputs).norm, rtol=1e-6, atol=1e-6)


def test_the_running_norm_takes_one_sequence_at_a_time() -> None:
    with pytest.raises(AssertionError):
        RunningNorm.of(inputs_of((2, 3, 4)))
    one = RunningNorm.of(inputs_of((1, 3, 4)))
    two = one.merge(one)
    with pytest.raises(AssertionError):
        one.merge(two)


@pytest.mark.parametrize("statistic", [SquareSum, RunningNorm])
def test_a_statistic_moves_between_devices_unchanged(statistic: type[SquareSum] | type[RunningNorm]) -> None:
    found = statistic.of(inputs_of((1, 3, 4)))
    moved = found.to(torch.device("cpu"))
    assert torch.equal(moved.norm, found.norm)
    assert moved.sequences == found.sequences
