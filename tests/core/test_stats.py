"""Input statistics give their norms, however the text is divided into chunks."""

import math
from typing import TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.stats import Gram, Moments, RunningGram, RunningNorm, SquareSum, Statistic

KINDS = (SquareSum, Moments, Gram, RunningNorm, RunningGram)
OF_CHUNKS = (SquareSum, Moments, Gram)
ONE_BY_ONE = (RunningNorm, RunningGram)
Kind = TypeVar("Kind", bound=Statistic)
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


def of_chunks(kind: type[Kind], inputs: torch.Tensor, chunk: int) -> Kind:
    first, *others = [kind.of(part) for part in inputs.split(chunk)]
    for other in others:
        first = first.merge(other)
    return first


@pytest.mark.parametrize("kind", OF_CHUNKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(shape=SHAPES, seed=st.integers(0, 1000))
def test_the_norm_is_the_root_of_the_squares_over_sequences(
    kind: type[Statistic], shape: tuple[int, int, int], seed: int, dtype: torch.dtype
) -> None:
    inputs = inputs_of(shape, seed, dtype)
    found = kind.of(inputs)
    assert found.norm.dtype == torch.float32
    assert found.norm.tolist() == pytest.approx(literal_norm(inputs), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_knows_its_tokens_and_sequences(kind: type[Statistic]) -> None:
    one = kind.of(inputs_of((1, 3, 4)))
    both = one.merge(kind.of(inputs_of((1, 5, 4))))
    for found, tokens, sequences in [(one, 3, 1), (both, 8, 2)]:
        assert isinstance(found, Statistic)
        assert (found.tokens, found.sequences) == (tokens, sequences)


@pytest.mark.parametrize("kind", OF_CHUNKS)
def test_a_chunk_counts_the_tokens_of_all_its_sequences(kind: type[Statistic]) -> None:
    found = kind.of(inputs_of((3, 5, 2)))
    assert (found.tokens, found.sequences) == (15, 3)


@pytest.mark.parametrize("kind", OF_CHUNKS)
def test_over_more_sequences_the_norm_is_smaller(kind: type[Statistic]) -> None:
    found = kind.of(inputs_of((2, 3, 4)))
    over = found.over(8)
    assert (over.tokens, over.sequences) == (6, 8)
    torch.testing.assert_close(over.norm, found.norm / 2)


@given(SHAPES, st.integers(1, 6), st.integers(0, 1000))
def test_merged_chunks_are_the_whole_text(shape: tuple[int, int, int], chunk: int, seed: int) -> None:
    inputs = inputs_of(shape, seed)
    merged, whole = of_chunks(SquareSum, inputs, chunk), SquareSum.of(inputs)
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
    found = of_chunks(RunningNorm, inputs, 1)
    assert found.sequences == shape[0]
    torch.testing.assert_close(found.norm, SquareSum.of(inputs).norm, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_the_running_statistics_take_one_sequence_at_a_time(kind: type[Statistic]) -> None:
    with pytest.raises(AssertionError):
        kind.of(inputs_of((2, 3, 4)))
    one = kind.of(inputs_of((1, 3, 4)))
    two = one.merge(one)
    with pytest.raises(AssertionError):
        one.merge(two)


@pytest.mark.parametrize("kind", KINDS)
def test_a_statistic_moves_between_devices_unchanged(kind: type[Statistic]) -> None:
    found = kind.of(inputs_of((1, 3, 4))).merge(kind.of(inputs_of((1, 2, 4), seed=1)))
    moved = found.to(torch.device("cpu"))
    assert torch.equal(moved.norm, found.norm)
    assert (moved.tokens, moved.sequences) == (found.tokens, found.sequences)


# --- Moments ---


@given(SHAPES, st.integers(1, 6), st.integers(0, 1000))
def test_moments_are_the_sum_per_sequence_and_the_mean_variance(
    shape: tuple[int, int, int], chunk: int, seed: int
) -> None:
    inputs = inputs_of(shape, seed)
    found = of_chunks(Moments, inputs, chunk)
    sums, variances = [], []
    for column in range(shape[2]):
        values = [[token[column] for token in sequence] for sequence in inputs.tolist()]
        sums.append(math.fsum(math.fsum(sequence) for sequence in values) / len(values))
        means = [math.fsum(sequence) / len(sequence) for sequence in values]
        squares = [(value - mean) ** 2 for sequence, mean in zip(values, means, strict=True) for value in sequence]
        variances.append(math.fsum(squares) / len(squares))
    assert found.sum.dtype == found.variance.dtype == torch.float32
    assert found.sum.tolist() == pytest.approx(sums, rel=1e-5, abs=1e-5)
    assert found.variance.tolist() == pytest.approx(variances, rel=1e-5, abs=1e-6)


def test_a_longer_sequence_weighs_more_in_the_variance() -> None:
    short = torch.tensor([[[1.0], [3.0]]])  # variance 1
    long = torch.tensor([[[10.0], [10.0], [10.0], [10.0], [16.0], [16.0]]])  # variance 8
    found = Moments.of(short).merge(Moments.of(long))
    assert found.variance.tolist() == [(2 * 1 + 6 * 8) / 8]
    assert found.sum.tolist() == [(4 + 72) / 2]


# --- Gram and RunningGram ---


def literal_gram(inputs: torch.Tensor) -> list[list[float]]:
    """Sum over all tokens of x_i * x_j."""
    tokens = [token for sequence in inputs.double().tolist() for token in sequence]
    columns = range(inputs.shape[2])
    return [[math.fsum(token[i] * token[j] for token in tokens) for j in columns] for i in columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(shape=SHAPES, chunk=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_gram_is_the_sum_of_outer_products(
    shape: tuple[int, int, int], chunk: int, seed: int, dtype: torch.dtype
) -> None:
    inputs = inputs_of(shape, seed, dtype)
    found = of_chunks(Gram, inputs, chunk)
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total, torch.tensor(literal_gram(inputs)), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.norm, SquareSum.of(inputs).norm, rtol=1e-5, atol=0)


@given(SHAPES, st.integers(0, 1000))
def test_a_running_gram_is_the_hessian_of_the_squared_error(shape: tuple[int, int, int], seed: int) -> None:
    inputs = inputs_of(shape, seed)
    found = of_chunks(RunningGram, inputs, 1)
    assert found.mean.dtype == torch.float32
    wanted = torch.tensor(literal_gram(inputs)) * 2 / shape[0]
    torch.testing.assert_close(found.mean, wanted, rtol=1e-5, atol=1e-3)


@given(SHAPES, st.integers(0, 1000))
def test_the_norm_of_a_running_gram_weighs_early_sequences_more(shape: tuple[int, int, int], seed: int) -> None:
    """By 2 / i for the i-th, as the released code does."""
    inputs = inputs_of(shape, seed)
    wanted = []
    for column in range(shape[2]):
        squares = [sum(token[column] ** 2 for token in sequence) for sequence in inputs.tolist()]
        mean = sum(2 / position * square for position, square in enumerate(squares, start=1)) / len(squares)
        wanted.append(math.sqrt(mean))
    found = of_chunks(RunningGram, inputs, 1).norm
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("columns", [3, 40, 130])
def test_a_running_gram_has_the_bits_of_the_released_order_of_operations(columns: int) -> None:
    inputs = inputs_of((7, 50, columns))
    hessian, squares = torch.zeros(columns, columns), torch.zeros(columns)
    for seen, sequence in enumerate(inputs):
        features = sequence.t()  # [columns, tokens]
        hessian *= seen / (seen + 1)
        squares *= seen / (seen + 1)
        features = math.sqrt(2 / (seen + 1)) * features
        hessian += features @ features.t()
        squares += torch.linalg.vector_norm(features, dim=1) ** 2 / (seen + 1)
    found = of_chunks(RunningGram, inputs, 1)
    assert torch.equal(found.mean, hessian)
    assert torch.equal(found.norm, squares.sqrt())


def test_a_running_gram_keeps_inputs_that_the_model_overwrites() -> None:
    inputs = inputs_of((1, 3, 4))
    found, wanted = RunningGram.of(inputs), RunningGram.of(inputs.clone())
    inputs.zero_()
    assert torch.equal(found.mean, wanted.mean)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_changes_neither_statistic_of_any_kind(kind: type[Statistic]) -> None:
    one, other = kind.of(inputs_of((1, 3, 4))), kind.of(inputs_of((1, 2, 4), seed=1))
    before = one.norm.clone(), other.norm.clone()
    one.merge(other)
    assert torch.equal(one.norm, before[0])
    assert torch.equal(other.norm, before[1])
