"""Does every file of `neuronal_ray.algorithms.methods` keep the contract of a method? A new file is picked up."""

import inspect
import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.declarations import Method
from neuronal_ray.algorithms.methods import Quota
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.stats import Gram, Moments, RunningGram, RunningNorm, SquareSum, Statistic

ROWS, COLUMNS = 12, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SERVE: dict[type[Statistic] | None, tuple[type[Statistic], ...]] = {
    None: (SquareSum,),
    SquareSum: (SquareSum, Moments, Gram, RunningNorm, RunningGram),
    Gram: (Gram,),
}
"""The kinds that have what a score reads of the kind its method names."""


@pytest.fixture(params=registry.names("methods"))
def method(request: pytest.FixtureRequest) -> Method:
    return registry.load("methods", request.param)


@pytest.fixture(params=[name for name in registry.names("methods") if registry.load("methods", name).solves])
def solver(request: pytest.FixtureRequest) -> Method:
    return registry.load("methods", request.param)


def some_weight(seed: int, dtype: torch.dtype = torch.float32, *, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def some_inputs(seed: int, kind: type[Statistic] | None = SquareSum) -> Statistic:
    """A statistic in which no input feature is dead."""
    generator = torch.Generator().manual_seed(seed)
    kind = SquareSum if kind is None else kind
    return kind.of(torch.randn(1, 9, COLUMNS, generator=generator) * torch.linspace(0.1, 5, COLUMNS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_is_finite_float32_of_the_weight_s_shape(method: Method, dtype: torch.dtype) -> None:
    for kind in SERVE[method.statistic]:
        for seed in range(3):
            score = method.score(some_weight(seed, dtype), some_inputs(seed, kind))
            assert score.dtype == torch.float32, kind
            assert score.shape == (ROWS, COLUMNS), kind
            assert score.isfinite().all(), kind


def test_weights_and_inputs_are_not_modified(method: Method) -> None:
    weight, inputs = some_weight(0), some_inputs(0, method.statistic)
    norm = inputs.norm.clone()
    method.score(weight, inputs)
    assert torch.equal(weight, some_weight(0))
    assert torch.equal(inputs.norm, norm)


def test_a_score_is_memory_of_its_own(method: Method) -> None:
    weight = some_weight(0)
    method.score(weight, some_inputs(0, method.statistic)).zero_()
    assert torch.equal(weight, some_weight(0))


def test_equal_arguments_give_equal_bits(method: Method) -> None:
    scores = [method.score(some_weight(1), some_inputs(1, method.statistic)) for _ in range(2)]
    assert torch.equal(*scores)


def test_a_transposed_view_scores_like_its_copy(method: Method) -> None:
    """GPT-2's Conv1D weights come as views."""
    stored = some_weight(2).t().contiguous()
    view, copy = (method.score(weight, some_inputs(2, method.statistic)) for weight in (stored.t(), some_weight(2)))
    torch.testing.assert_close(view, copy, rtol=1e-6, atol=0)  # sums over another memory order differ in the last bit


@pytest.mark.parametrize("factor", [1.5, 4.0, 100.0])
def test_a_larger_weight_does_not_go_sooner(method: Method, factor: float) -> None:
    weight, inputs = some_weight(3), some_inputs(3, method.statistic)
    before = method.score(weight, inputs)
    ranks = rank_rows(before)
    for row, column in [(0, 0), (3, 7), (11, 19), (5, 2)]:
        scaled = weight.clone()
        scaled[row, column] *= factor
        after = method.score(scaled, inputs)
        assert after[row, column] >= before[row, column], (row, column)
        assert rank_rows(after)[row, column] >= ranks[row, column], (row, column)


def test_the_sign_of_a_weight_does_not_matter(method: Method) -> None:
    weight, inputs = some_weight(4), some_inputs(4, method.statistic)
    assert torch.equal(rank_rows(method.score(weight, inputs)), rank_rows(method.score(-weight, inputs)))


def test_a_zero_goes_first(method: Method) -> None:
    weight = some_weight(5)
    weight[:, 4] = 0
    assert (rank_rows(method.score(weight, some_inputs(5, method.statistic)))[:, 4] == 0).all()


def test_a_method_says_what_it_reads_and_whether_it_solves(method: Method) -> None:
    assert method.statistic in SERVE
    assert (method.factorize is not None) is (method.solve is not None) is method.solves
    if method.statistic is None:
        assert torch.equal(method.score(some_weight(6), None), method.score(some_weight(6), some_inputs(6)))


def test_an_unknown_setting_is_refused(method: Method) -> None:
    functions = method.functions
    registry.check_settings(functions, {}, owner="method")
    with pytest.raises(ValueError, match=r"--set method\.nonsense: unknown setting, expected "):
        registry.check_settings(functions, {"nonsense": 1.0}, owner="method")


def test_every_setting_has_a_default_that_is_accepted(method: Method) -> None:
    """And of one name there is one default, wherever it is read."""
    defaults: dict[str, object] = {}
    checked = [] if method.check is None else [method.check]
    for function in method.functions + checked:
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                assert parameter.default is not parameter.empty, name
                assert defaults.setdefault(name, parameter.default) == parameter.default, name
    registry.check_settings(method.functions, defaults, owner="method")
    for name in defaults:
        with pytest.raises(ValueError, match=rf"--set method\.{name}: 'text' is not of type "):
            registry.check_settings(method.functions, {name: "text"}, owner="method")


def test_a_method_says_what_it_is(method: Method) -> None:
    assert sys.modules[method.score.__module__].__doc__
    assert method.score.__doc__


# --- methods that solve ---


def correlated(columns: int, seed: int, *, own: float = 0.3, dead: tuple[int, ...] = ()) -> Tensor:
    """Inputs [2, tokens, columns] that share directions, the less the larger `own`."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + own * torch.eye(columns)
    inputs = torch.randn(2, 2 * columns, columns, generator=generator) @ mix
    inputs[..., list(dead)] = 0
    return inputs


def factor_of(solver: Method, inputs: Tensor) -> object:
    return solver.factorize(solver.statistic.of(inputs))


def layer_error(weight: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    """||X W - X W'||^2."""
    return float((inputs.double() @ (weight - pruned).double().t()).square().sum())


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 5), (1, 40), (24, 16), (3, 130), (10, 300)])
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8, 0.97])
def test_a_solver_removes_exactly_its_quota(solver: Method, rows: int, columns: int, rate: float) -> None:
    weight = some_weight(0, rows=rows, columns=columns)
    quota = Quota(removed=round(rate * rows * columns))
    found = solver.solve(weight, factor_of(solver, correlated(columns, 1)), quota)
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    assert found.isfinite().all()
    assert int((found == 0).sum()) == quota.removed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_solver_asked_for_nothing_changes_nothing(solver: Method, dtype: torch.dtype) -> None:
    weight = some_weight(2, dtype)
    found = solver.solve(weight, factor_of(solver, correlated(COLUMNS, 3)), Quota(removed=0))
    assert found.dtype == torch.float32
    assert torch.equal(found, weight.float())


def test_a_solver_asked_for_all_removes_all(solver: Method) -> None:
    found = solver.solve(some_weight(4), factor_of(solver, correlated(COLUMNS, 5)), Quota(removed=ROWS * COLUMNS))
    assert not found.any()


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (3, 8)])
@pytest.mark.parametrize("columns", [16, 136])
def test_a_solver_keeps_a_pattern_in_every_group(solver: Method, kept: int, group: int, columns: int) -> None:
    weight = some_weight(6, rows=5, columns=columns)
    quota = Quota(removed=weight.numel() * (group - kept) // group, group=group)
    found = solver.solve(weight, factor_of(solver, correlated(columns, 7)), quota)
    zeros = (found == 0).view(5, -1, group).sum(dim=2)  # [rows, columns] -> [rows, groups]
    assert (zeros == group - kept).all(), zeros


def test_a_solver_modifies_none_of_its_arguments(solver: Method) -> None:
    weight, inputs = some_weight(8), correlated(COLUMNS, 9)
    statistic = solver.statistic.of(inputs)
    norm = statistic.norm.clone()
    factor = solver.factorize(statistic)
    before = {name: value.clone() for name, value in vars(factor).items() if isinstance(value, Tensor)}
    for quota in (Quota(removed=150), Quota(removed=0), Quota(removed=120, group=4)):
        solver.solve(weight, factor, quota).zero_()
    assert torch.equal(weight, some_weight(8))
    assert torch.equal(statistic.norm, norm)
    assert before
    for name, value in before.items():
        assert torch.equal(getattr(factor, name), value), name


def test_a_solver_repeats_its_bits(solver: Method) -> None:
    factor = factor_of(solver, correlated(COLUMNS, 11))
    found = [solver.solve(some_weight(10), factor, Quota(removed=150)) for _ in range(2)]
    assert torch.equal(*found)
    assert torch.equal(
        found[0], solver.solve(some_weight(10), factor_of(solver, correlated(COLUMNS, 11)), Quota(removed=150))
    )


@pytest.mark.parametrize("quota", [Quota(removed=150), Quota(removed=120, group=4)])
def test_a_solver_takes_a_transposed_view_for_its_copy(solver: Method, quota: Quota) -> None:
    factor = factor_of(solver, correlated(COLUMNS, 13))
    stored = some_weight(12).t().contiguous()
    kept = stored.clone()
    assert torch.equal(solver.solve(stored.t(), factor, quota), solver.solve(some_weight(12), factor, quota))
    assert torch.equal(stored, kept)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(5))
def test_a_solver_s_error_is_not_above_that_of_removing_the_smallest(solver: Method, rate: float, seed: int) -> None:
    weight, inputs = some_weight(seed, rows=24, columns=32), correlated(32, 100 + seed, own=2.0)
    removed = round(rate * weight.numel())
    found = solver.solve(weight, factor_of(solver, inputs), Quota(removed=removed))
    smallest = weight.abs().flatten().kthvalue(removed).values
    masked = weight * (weight.abs() > smallest)
    assert int((masked == 0).sum()) == removed
    errors = layer_error(weight, found, inputs), layer_error(weight, masked, inputs)
    assert errors[0] <= errors[1], errors


def test_a_solver_removes_the_weights_of_dead_inputs_first(solver: Method) -> None:
    weight, inputs = some_weight(14), correlated(COLUMNS, 15, dead=(0, 7, 19))
    found = solver.solve(weight, factor_of(solver, inputs), Quota(removed=150))
    assert found.isfinite().all()
    assert not found[:, [0, 7, 19]].any()
    assert int((found == 0).sum()) == 150


def test_zeros_beyond_the_quota_were_zeros_before(solver: Method) -> None:
    weight = some_weight(16)
    weight[:, 3:12] = 0
    found = solver.solve(weight, factor_of(solver, correlated(COLUMNS, 17)), Quota(removed=30))
    assert int((found == 0).sum()) >= 30
    assert (weight[found == 0] == 0).all()


# --- weights that are zero already ---


def sparse_weight(seed: int, rate: float, *, rows: int = 10, columns: int = 300) -> Tensor:
    """Zeros gather towards the last columns, so that the slabs and groups of a solver have unequal shares of them."""
    weight = some_weight(seed, rows=rows, columns=columns)
    chances = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1))
    zeros = (chances / torch.linspace(0.3, 1.7, columns)).flatten().argsort()[: round(rate * rows * columns)]
    weight.view(-1)[zeros] = 0
    return weight


def revived(weight: Tensor, pruned: Tensor) -> int:
    return int(((weight == 0) & (pruned != 0)).sum())


@pytest.mark.parametrize("removed", [2101, 2400, 2999])
@pytest.mark.parametrize("rate", [0.001, 0.3, 0.7])
def test_a_solver_counts_zeros_as_removed_and_gives_none_a_value(solver: Method, rate: float, removed: int) -> None:
    weight = sparse_weight(20, rate)
    factor = factor_of(solver, correlated(300, 21))
    found = solver.solve(weight, factor, Quota(removed=removed))
    assert revived(weight, found) == 0, f"{revived(weight, found)} of {int((weight == 0).sum())} zeros are numbers"
    assert int((found == 0).sum()) == removed


def test_a_solver_asked_for_fewer_than_there_are_keeps_all_zeros(solver: Method) -> None:
    weight = sparse_weight(22, 0.7)
    found = solver.solve(weight, factor_of(solver, correlated(300, 23)), Quota(removed=600))
    assert torch.equal(found == 0, weight == 0)


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (5, 10)])
def test_a_group_loses_the_pattern_s_weights_or_its_zeros_if_they_are_more(
    solver: Method, kept: int, group: int
) -> None:
    weight = sparse_weight(24, 0.5)
    quota = Quota(removed=weight.numel() * (group - kept) // group, group=group)
    found = solver.solve(weight, factor_of(solver, correlated(300, 25)), quota)
    zeros, before = ((tensor == 0).view(10, -1, group).sum(dim=2) for tensor in (found, weight))
    assert revived(weight, found) == 0
    assert torch.equal(zeros, before.clamp_min(group - kept))


def test_a_solver_may_revive_zeros_when_asked_to(solver: Method) -> None:
    weight = sparse_weight(26, 0.7)
    quota = Quota(removed=1800, revive=True)
    found = solver.solve(weight, factor_of(solver, correlated(300, 27, own=0.05)), quota)
    assert int((found == 0).sum()) <= 2100
    if solver is registry.load("methods", "sparsegpt"):
        assert int((found == 0).sum()) == 1800, "the error of removed weights falls on zeros, too"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_zeros_nothing_depends_on_what_becomes_of_them(solver: Method, dtype: torch.dtype) -> None:
    weight = some_weight(28, dtype, columns=COLUMNS)
    factor = factor_of(solver, correlated(COLUMNS, 29))
    for quota in (Quota(removed=130), Quota(removed=120, group=4)):
        assert torch.equal(
            solver.solve(weight, factor, quota), solver.solve(weight, factor, replace(quota, revive=True))
        )
