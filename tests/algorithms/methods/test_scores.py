"""Is each method's score its formula, in float32, for weights of any float type?"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.methods import magnitude, multiflow, wanda
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.stats import SquareSum

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Matrix = list[list[float]]


def literal_magnitude(weight: Matrix, norms: list[float]) -> Matrix:
    return [[abs(value) for value in row] for row in weight]


def literal_wanda(weight: Matrix, norms: list[float]) -> Matrix:
    return [[abs(value) * norm for value, norm in zip(row, norms, strict=True)] for row in weight]


def column_flow(weight: Matrix, norms: list[float]) -> list[float]:
    """The mean over rows of |W| * a."""
    return [sum(flows) / len(flows) for flows in zip(*literal_wanda(weight, norms), strict=True)]


def literal_multiflow(weight: Matrix, norms: list[float]) -> Matrix:
    return literal_wanda(weight, column_flow(weight, norms))


def published_multiflow(weight: Matrix, norms: list[float]) -> Matrix:
    """With the mean over columns as a third factor, as the paper prints it."""
    row_flow = [sum(flows) / len(flows) for flows in literal_wanda(weight, norms)]
    scores = literal_multiflow(weight, norms)
    return [[score * flow for score in row] for row, flow in zip(scores, row_flow, strict=True)]


LITERAL: dict[str, Callable[[Matrix, list[float]], Matrix]] = {
    "magnitude": literal_magnitude,
    "wanda": literal_wanda,
    "multiflow": literal_multiflow,
}


def random_case(rows: int, columns: int, seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, SquareSum]:
    """Weight [rows, columns] and the statistic of some inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight, SquareSum.of(torch.randn(2, 3, columns, generator=generator))


@pytest.mark.parametrize("name", list(LITERAL))
@pytest.mark.parametrize("dtype", DTYPES)
@given(rows=st.integers(1, 5), columns=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_score_is_its_formula_in_float32(name: str, dtype: torch.dtype, rows: int, columns: int, seed: int) -> None:
    weight, inputs = random_case(rows, columns, seed, dtype)
    before = weight.clone()
    found = registry.load("methods", name).score(weight, inputs)
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    wanted = torch.tensor(LITERAL[name](weight.tolist(), inputs.norm.tolist()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-12)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("name", list(LITERAL))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_smallest_half_precision_weights_do_not_underflow(name: str, dtype: torch.dtype) -> None:
    tiny = 2.0**-24  # the least positive float16
    weight = torch.tensor([[tiny, -2 * tiny], [3 * tiny, 4 * tiny]], dtype=dtype)
    inputs = SquareSum.of(torch.full((1, 1, 2), 0.01))
    found = registry.load("methods", name).score(weight, inputs)
    wanted = torch.tensor(LITERAL[name](weight.tolist(), inputs.norm.tolist()))
    assert (found > 0).all(), found
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", list(LITERAL))
def test_a_transposed_view_scores_as_its_copy(name: str) -> None:
    """Conv1D keeps its weights as [columns, rows]."""
    weight, inputs = random_case(3, 5, 0, torch.float32)
    view = weight.t().contiguous().t()
    score = registry.load("methods", name).score
    assert torch.equal(score(view, inputs), score(weight, inputs))


def test_magnitude_needs_no_text() -> None:
    assert magnitude.METHOD.statistic is None
    assert magnitude.score(torch.tensor([[-2.0, 1.0]]), None).tolist() == [[2.0, 1.0]]
    assert wanda.METHOD.statistic is SquareSum
    assert multiflow.METHOD.statistic is SquareSum


def test_an_input_that_is_always_zero_goes_first() -> None:
    weight = torch.tensor([[9.0, 1.0, 2.0], [9.0, 2.0, 1.0]])
    inputs = SquareSum.of(torch.tensor([[[0.0, 1.0, 1.0]]]))
    for method in (wanda, multiflow):
        assert rank_rows(method.score(weight, inputs))[:, 0].tolist() == [0, 0], method.__name__


def test_multiflow_orders_a_row_by_magnitude_times_the_flow_into_its_inputs() -> None:
    weight = torch.tensor([[1.0, 2.0], [8.0, 1.0]])
    inputs = SquareSum.of(torch.ones(1, 1, 2))
    found = multiflow.score(weight, inputs)
    assert found.tolist() == [[1 * 4.5, 2 * 1.5], [8 * 4.5, 1 * 1.5]]
    assert rank_rows(found).tolist() == [[1, 0], [1, 0]]
    assert rank_rows(wanda.score(weight, inputs)).tolist() == [[0, 1], [1, 0]]


@given(rows=st.integers(1, 5), columns=st.integers(1, 6), seed=st.integers(0, 1000))
def test_multiflow_ranks_each_row_as_the_published_product_of_three_does(rows: int, columns: int, seed: int) -> None:
    weight, inputs = random_case(rows, columns, seed, torch.float32)
    published = torch.tensor(published_multiflow(weight.tolist(), inputs.norm.tolist()))
    assert torch.equal(rank_rows(multiflow.score(weight, inputs)), rank_rows(published))
