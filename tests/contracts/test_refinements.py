"""Does every file of `neuronal_ray.algorithms.refinements` keep the contract? A new file is picked up."""

import inspect
import sys

import pytest
import torch
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.declarations import Refinement
from neuronal_ray.core.stats import Statistic

ROWS, COLUMNS = 12, 24
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GROUPS = (0, 4, 8)


@pytest.fixture(params=registry.names("refinements"))
def refinement(request: pytest.FixtureRequest) -> Refinement:
    return registry.load("refinements", request.param)


def some_weight(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)


def some_inputs(seed: int, kind: type[Statistic]) -> Statistic:
    """Of these features, the first is dead and the second constant."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(3, 9, COLUMNS, generator=generator) * torch.linspace(0.1, 5, COLUMNS) + 0.5
    inputs[..., 0] = 0
    inputs[..., 1] = 1
    return kind.of(inputs)


def some_mask(seed: int, group: int) -> Tensor:
    """Rows lose different numbers of weights; under a pattern every group loses as many."""
    generator = torch.Generator().manual_seed(seed)
    if group == 0:
        order = torch.rand(ROWS, COLUMNS, generator=generator).argsort(dim=1)
        return order < torch.linspace(0, COLUMNS, ROWS).round()[:, None]
    order = torch.rand(ROWS, COLUMNS // group, group, generator=generator).argsort(dim=2)
    return (order < 1 + seed % (group - 1)).flatten(1)  # [rows, groups, group] -> [rows, columns]


def refined(refinement: Refinement, seed: int, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    weight, inputs = some_weight(seed, dtype), some_inputs(seed, refinement.statistic)
    score = weight.float().abs() * inputs.norm
    mask: Tensor = refinement.refine(weight, score, some_mask(seed, group), inputs, group)
    return mask


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_and_every_group_removes_as_many_as_before(
    refinement: Refinement, dtype: torch.dtype, group: int
) -> None:
    changed = 0
    for seed in range(4):
        before, after = some_mask(seed, group), refined(refinement, seed, group, dtype)
        assert after.dtype == torch.bool
        assert after.shape == (ROWS, COLUMNS)
        width = group or COLUMNS
        counts = [mask.view(ROWS, -1, width).sum(dim=2) for mask in (before, after)]
        assert torch.equal(*counts)
        changed += int((before != after).sum())
    assert changed > 0, "the default settings refine nothing"


@pytest.mark.parametrize("group", GROUPS)
def test_arguments_are_not_modified_and_the_result_is_memory_of_its_own(refinement: Refinement, group: int) -> None:
    weight, inputs, mask = some_weight(1), some_inputs(1, refinement.statistic), some_mask(1, group)
    score = weight.abs() * inputs.norm
    kept = [tensor.clone() for tensor in (weight, score, mask, inputs.norm)]
    refinement.refine(weight, score, mask, inputs, group).fill_(True)
    for before, after in zip(kept, (weight, score, mask, inputs.norm), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("full", [False, True])
def test_a_mask_that_leaves_no_choice_stays(refinement: Refinement, full: bool) -> None:
    weight, inputs = some_weight(2), some_inputs(2, refinement.statistic)
    mask = torch.full((ROWS, COLUMNS), full)
    found = refinement.refine(weight, weight.abs(), mask, inputs, 0)
    assert torch.equal(found, mask)
    found.fill_(not full)
    assert bool(mask.all()) is full


@pytest.mark.parametrize("group", GROUPS)
def test_equal_arguments_give_equal_masks(refinement: Refinement, group: int) -> None:
    assert torch.equal(*[refined(refinement, 3, group) for _ in range(2)])


@pytest.mark.parametrize("group", GROUPS)
def test_rows_are_refined_each_on_its_own(refinement: Refinement, group: int) -> None:
    weight, inputs, mask = some_weight(4), some_inputs(4, refinement.statistic), some_mask(4, group)
    score = weight.abs() * inputs.norm
    whole = refinement.refine(weight, score, mask, inputs, group)
    for row in range(0, ROWS, 3):
        one = refinement.refine(*(tensor[row : row + 1] for tensor in (weight, score, mask)), inputs, group)
        assert torch.equal(one[0], whole[row]), row


def test_a_transposed_view_is_refined_like_its_copy(refinement: Refinement) -> None:
    """GPT-2's Conv1D weights come as views."""
    weight, inputs, mask = some_weight(5), some_inputs(5, refinement.statistic), some_mask(5, 0)
    score = weight.abs() * inputs.norm
    masks = [refinement.refine(given, score, mask, inputs, 0) for given in (weight, weight.t().contiguous().t())]
    assert torch.equal(*masks)


def test_all_weights_zero_are_no_trouble(refinement: Refinement) -> None:
    weight, inputs, mask = torch.zeros(ROWS, COLUMNS), some_inputs(6, refinement.statistic), some_mask(6, 0)
    found = refinement.refine(weight, weight, mask, inputs, 0)
    assert torch.equal(found.sum(dim=1), mask.sum(dim=1))


def test_a_refinement_says_what_it_reads(refinement: Refinement) -> None:
    assert isinstance(some_inputs(0, refinement.statistic), Statistic)


def test_settings_have_defaults_and_an_unknown_one_is_refused(refinement: Refinement) -> None:
    settings = [
        parameter
        for parameter in inspect.signature(refinement.refine).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    given = {parameter.name: parameter.default for parameter in settings}
    registry.check_settings([refinement.refine], given, owner="refinement")
    for name, argument in ({} if refinement.check is None else registry.arguments_of(refinement.check)).items():
        assert argument.default == given[name], name
    with pytest.raises(ValueError, match=r"--set refinement\.nonsense: unknown setting, expected "):
        registry.check_settings([refinement.refine], {"nonsense": 1.0}, owner="refinement")


def test_a_refinement_says_what_it_is(refinement: Refinement) -> None:
    assert sys.modules[refinement.refine.__module__].__doc__
    assert refinement.refine.__doc__
