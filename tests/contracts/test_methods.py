"""Does every pruning method keep the contract of `neuronal_ray.methods`? A new file there is picked up here."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

from neuronal_ray import plugins
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.stats import RunningNorm, SquareSum, Statistic

ROWS, COLUMNS = 12, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (SquareSum, RunningNorm)


@pytest.fixture(params=plugins.names("methods"))
def method(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("methods", request.param)


def some_weight(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)


def some_inputs(seed: int, kind: type[Statistic] = SquareSum) -> Statistic:
    """A statistic in which no input feature is dead."""
    generator = torch.Generator().manual_seed(seed)
    return kind.of(torch.randn(1, 9, COLUMNS, generator=generator) * torch.linspace(0.1, 5, COLUMNS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_finite_float32_of_the_weight_s_shape(
    method: ModuleType, dtype: torch.dtype, kind: type[Statistic]
) -> None:
    for seed in range(3):
        score = method.score(some_weight(seed, dtype), some_inputs(seed, kind))
        assert score.dtype == torch.float32
        assert score.shape == (ROWS, COLUMNS)
        assert score.isfinite().all()


def test_weights_and_inputs_are_not_modified(method: ModuleType) -> None:
    weight, inputs = some_weight(0), some_inputs(0)
    norm = inputs.norm.clone()
    method.score(weight, inputs)
    assert torch.equal(weight, some_weight(0))
    assert torch.equal(inputs.norm, norm)


def test_a_score_is_memory_of_its_own(method: ModuleType) -> None:
    weight = some_weight(0)
    method.score(weight, some_inputs(0)).zero_()
    assert torch.equal(weight, some_weight(0))


def test_equal_arguments_give_equal_bits(method: ModuleType) -> None:
    scores = [method.score(some_weight(1), some_inputs(1)) for _ in range(2)]
    assert torch.equal(*scores)


def test_a_transposed_view_scores_like_its_copy(method: ModuleType) -> None:
    """GPT-2's Conv1D weights come as views."""
    stored = some_weight(2).t().contiguous()
    view, copy = (method.score(weight, some_inputs(2)) for weight in (stored.t(), some_weight(2)))
    torch.testing.assert_close(view, copy, rtol=1e-6, atol=0)  # sums over another memory order differ in the last bit


@pytest.mark.parametrize("factor", [1.5, 4.0, 100.0])
def test_a_larger_weight_does_not_go_sooner(method: ModuleType, factor: float) -> None:
    weight, inputs = some_weight(3), some_inputs(3)
    before = method.score(weight, inputs)
    ranks = rank_rows(before)
    for row, column in [(0, 0), (3, 7), (11, 19), (5, 2)]:
        scaled = weight.clone()
        scaled[row, column] *= factor
        after = method.score(scaled, inputs)
        assert after[row, column] >= before[row, column], (row, column)
        assert rank_rows(after)[row, column] >= ranks[row, column], (row, column)


def test_the_sign_of_a_weight_does_not_matter(method: ModuleType) -> None:
    weight, inputs = some_weight(4), some_inputs(4)
    assert torch.equal(rank_rows(method.score(weight, inputs)), rank_rows(method.score(-weight, inputs)))


def test_a_zero_goes_first(method: ModuleType) -> None:
    weight = some_weight(5)
    weight[:, 4] = 0
    assert (rank_rows(method.score(weight, some_inputs(5)))[:, 4] == 0).all()


def test_a_method_says_whether_it_needs_inputs(method: ModuleType) -> None:
    assert isinstance(method.NEEDS_INPUTS, bool)
    if not method.NEEDS_INPUTS:
        assert torch.equal(method.score(some_weight(6), None), method.score(some_weight(6), some_inputs(6)))


def test_an_unknown_setting_is_refused(method: ModuleType) -> None:
    plugins.check_settings(method.score, {}, owner="method")
    with pytest.raises(ValueError, match=r"--set method\.nonsense: unknown setting, expected "):
        plugins.check_settings(method.score, {"nonsense": 1.0}, owner="method")


def test_a_method_says_what_it_is(method: ModuleType) -> None:
    assert method.__doc__
    assert method.score.__doc__
