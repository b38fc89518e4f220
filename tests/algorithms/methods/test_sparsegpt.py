"""Is SparseGPT's sweep the optimal brain surgeon's, column by column, with the mask, budget and ties that it says?"""

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neuronal_ray.algorithms.methods import Quota, sparsegpt
from neuronal_ray.core.masks import smallest
from neuronal_ray.core.stats import Gram, RunningGram

# --- the oracle: plain loops in float64, an explicit inverse of what is left of the Hessian at every column ---


def literal_hessian(inputs: Tensor, damping: float = 0.01) -> tuple[Tensor, list[int]]:
    """Of inputs [sequences, tokens, columns]: the damped Hessian in float64 and the columns of dead inputs."""
    columns = inputs.shape[2]
    tokens = [token for sequence in inputs.double() for token in sequence]
    hessian = sum(torch.outer(token, token) for token in tokens) * 2 / len(inputs)
    dead = [j for j in range(columns) if hessian[j, j] == 0]
    for j in dead:
        hessian[j, j] = 1.0
    mean = sum(float(hessian[j, j]) for j in range(columns)) / columns
    return hessian + damping * mean * torch.eye(columns, dtype=torch.float64), dead


def literal_solve(weight: Tensor, inputs: Tensor, quota: Quota, slab: int) -> Tensor:
    """Selection by sorting triples; the removed weight's error goes to the later columns by the inverse's first row."""
    hessian, dead = literal_hessian(inputs)
    rows, columns = weight.shape
    w = weight.double().clone()
    for j in dead:
        w[:, j] = 0
    rests = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]  # the Hessians of the columns from j on
    goes: set[tuple[int, int]] = set()

    def cost(row: int, column: int) -> float:
        return float(w[row, column] ** 2 / rests[column][0, 0])

    for first in range(0, columns, slab):
        last = min(first + slab, columns)
        costs = sorted((cost(row, j), row, j) for row in range(rows) for j in range(first, last))
        if quota.rate is not None:
            threshold = costs[int(len(costs) * quota.rate)][0]
            goes |= {(row, j) for value, row, j in costs if value <= threshold}
        elif not quota.group:
            count = round(quota.removed * last / columns) - round(quota.removed * first / columns)
            goes |= {(row, j) for _, row, j in costs[:count]}
        for j in range(first, last):
            if quota.group and j % quota.group == 0:
                for row in range(rows):
                    own = sorted((cost(row, k), k) for k in range(j, j + quota.group))
                    goes |= {(row, k) for _, k in own[: quota.removed * quota.group // (rows * columns)]}
            for row in range(rows):
                if (row, j) in goes:
                    w[row, j:] -= w[row, j] / rests[j][0, 0] * rests[j][0]
                    w[row, j] = 0
    return w


# --- cases ---


def correlated(columns: int, seed: int, *, sequences: int = 3, dead: tuple[int, ...] = ()) -> Tensor:
    """Inputs [sequences, tokens, columns] that share directions."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    inputs = torch.randn(sequences, 2 * columns, columns, generator=generator) @ mix
    inputs[..., list(dead)] = 0
    return inputs


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def solved(weight: Tensor, inputs: Tensor, quota: Quota, *, slab: int = 128) -> Tensor:
    return sparsegpt.solve(weight, sparsegpt.factorize(Gram.of(inputs)), quota, slab=slab)


def independent(columns: int) -> sparsegpt.Factor:
    """The factor of inputs that share nothing: no weight makes up for another."""
    return sparsegpt.factorize(Gram.of(torch.eye(columns)[None]))


def assert_equal_masks_and_close(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == torch.float32
    assert torch.equal(found == 0, wanted == 0)
    torch.testing.assert_close(found, wanted.float(), rtol=2e-4, atol=2e-5)


# --- the sweep ---


@pytest.mark.parametrize(
    ("rows", "columns", "slab"),
    [(1, 1, 128), (3, 7, 128), (5, 20, 8), (4, 33, 33), (6, 40, 24), (2, 50, 17), (9, 12, 1), (7, 36, 20)],
)
@pytest.mark.parametrize("rate", [0.3, 0.55, 0.8])
def test_the_sweep_is_the_literal_one(rows: int, columns: int, slab: int, rate: float) -> None:
    weight, inputs = normal(rows, columns, 1), correlated(columns, 2)
    quota = Quota(removed=round(rate * rows * columns))
    found = solved(weight, inputs, quota, slab=slab)
    assert_equal_masks_and_close(found, literal_solve(weight, inputs, quota, slab))
    assert int((found == 0).sum()) == quota.removed


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (3, 8), (1, 4), (1, 2), (5, 8)])
@pytest.mark.parametrize("slab", [5, 20, 128])
def test_a_pattern_is_chosen_inside_the_sweep(kept: int, group: int, slab: int) -> None:
    weight, inputs = normal(5, 24, 3), correlated(24, 4)
    quota = Quota(removed=(group - kept) * weight.numel() // group, group=group)
    found = solved(weight, inputs, quota, slab=slab)
    assert_equal_masks_and_close(found, literal_solve(weight, inputs, quota, slab))
    zeros = (found == 0).view(5, -1, group).sum(dim=2)
    assert (zeros == group - kept).all(), zeros


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.7, 0.99])
@pytest.mark.parametrize(("rows", "columns", "slab"), [(5, 20, 8), (3, 33, 128)])
def test_the_released_rule_removes_up_to_the_weight_at_the_rate(
    rows: int, columns: int, slab: int, rate: float
) -> None:
    weight, inputs = normal(rows, columns, 5), correlated(columns, 6)
    quota = Quota(removed=round(rate * weight.numel()), rate=rate)
    found = solved(weight, inputs, quota, slab=slab)
    assert_equal_masks_and_close(found, literal_solve(weight, inputs, quota, slab))
    for first in range(0, columns, slab):
        part = found[:, first : first + slab]
        assert int((part == 0).sum()) == int(rate * part.numel()) + 1


def test_the_released_rule_removes_all_ties() -> None:
    weight = torch.tensor([[1.0, 2.0, 2.0], [2.0, 3.0, 2.0]])
    found = sparsegpt.solve(weight, independent(3), Quota(removed=3, rate=0.4))
    assert found.tolist() == [[0, 0, 0], [0, 3, 0]]


def test_the_released_rule_at_rate_one_removes_all() -> None:
    found = solved(normal(3, 5, 0), correlated(5, 0), Quota(removed=15, rate=1.0))
    assert not found.any()


@pytest.mark.parametrize("removed", [0, 1, 50, 119, 153, 236, 237])
def test_after_each_slab_its_part_of_the_budget_is_spent(removed: int) -> None:
    rows, columns, slab = 3, 79, 10
    found = solved(normal(rows, columns, 7), correlated(columns, 8), Quota(removed=removed), slab=slab)
    for stop in [*range(slab, columns, slab), columns]:
        assert int((found[:, :stop] == 0).sum()) == round(removed * stop / columns), stop


def test_the_size_of_the_mini_slabs_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, inputs, quota = normal(6, 90, 9), correlated(90, 10), Quota(removed=300)
    found = []
    for columns in (1, 7, 16, 500):
        monkeypatch.setattr(sparsegpt, "_LEAF_COLUMNS", columns)
        found.append(solved(weight, inputs, quota, slab=40))
    for other in found[1:]:
        assert_equal_masks_and_close(other, found[0])


def test_the_update_lowers_the_error_of_the_layer() -> None:
    weight, inputs = normal(20, 40, 11), correlated(40, 12)
    found = solved(weight, inputs, Quota(removed=480))
    masked = weight * (found != 0)
    errors = [float((inputs @ (weight - other).t()).square().sum()) for other in (found, masked)]
    assert errors[0] < 0.8 * errors[1], errors


# --- which of equal costs go ---


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 8),
    part=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 5, 1000]),
    scale=st.sampled_from([1e-30, 1e-12, 1.0, 1e12, 1e25]),
    seed=st.integers(0, 1000),
)
def test_the_lowest_go_and_of_equals_the_first_in_order_of_rows(
    rows: int, columns: int, part: float, levels: int, scale: float, seed: int
) -> None:
    """Also where squares are 0 or infinite in float32, and with zeros among the weights, which are the first to go."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-levels, levels + 1, (rows, columns), generator=generator) * scale
    removed = round(part * rows * columns)
    found = sparsegpt.solve(weight, independent(columns), Quota(removed=removed))
    squares, zero = weight.square().flatten().tolist(), (weight == 0).flatten().tolist()
    removed = max(removed, sum(zero))
    going = sorted(range(rows * columns), key=lambda index: (not zero[index], squares[index], index))[:removed]
    wanted = weight.flatten()
    wanted[going] = 0
    assert torch.equal(found.flatten(), wanted)


def test_within_a_group_the_lower_of_equal_columns_goes() -> None:
    weight = torch.tensor([[1.0, 1.0, -1.0, 1.0, 3.0, 2.0, 2.0, 2.0]])
    found = sparsegpt.solve(weight, independent(8), Quota(removed=4, group=4))
    assert found.tolist() == [[0, 0, -1, 1, 3, 0, 0, 2]]


@pytest.mark.parametrize("position", [1, 2, 100, 1999, 2000])
def test_the_position_of_the_cut_is_exact_over_all_magnitudes(position: int) -> None:
    generator = torch.Generator().manual_seed(position)
    values = torch.cat([torch.rand(1000, generator=generator), 10.0 ** torch.linspace(-44, 38, 995), torch.zeros(3)])
    values = torch.cat([values, torch.full((2,), math.inf)])
    found = smallest(values.view(40, 50), position)
    assert float(found) == sorted(values.tolist())[position - 1]


# --- zeros and dead inputs ---


def test_weights_of_inputs_that_are_always_zero_go_first() -> None:
    weight, inputs = normal(4, 12, 13), correlated(12, 14, dead=(2, 7))
    quota = Quota(removed=20)
    found = solved(weight, inputs, quota)
    assert_equal_masks_and_close(found, literal_solve(weight, inputs, quota, 128))
    assert not found[:, [2, 7]].any()
    assert int((found == 0).sum()) == 20


def test_dead_inputs_are_zero_beyond_the_budget_and_leave_the_rest_alone() -> None:
    weight, inputs = normal(4, 12, 15), correlated(12, 16, dead=(0, 11))
    found = solved(weight, inputs, Quota(removed=3))
    assert not found[:, [0, 11]].any()
    assert torch.equal(found[:, 1:11], weight[:, 1:11])


def test_inputs_that_are_all_zero_leave_a_finite_result() -> None:
    assert not solved(normal(2, 3, 0), torch.zeros(1, 4, 3), Quota(removed=1)).any()


def test_more_zeros_than_asked_are_zeros_of_the_weight() -> None:
    weight = normal(4, 10, 17)
    weight[:, [8, 9]] = 0
    found = sparsegpt.solve(weight, independent(10), Quota(removed=5))
    assert int((found[:, :8] == 0).sum()) == 0
    assert torch.equal(found, weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_swept_in_float32(dtype: torch.dtype) -> None:
    weight, inputs = normal(4, 12, 18).to(dtype), correlated(12, 19)
    found = solved(weight, inputs, Quota(removed=20))
    assert found.dtype == torch.float32
    assert torch.equal(found, solved(weight.float(), inputs, Quota(removed=20)))


# --- the factor ---


@pytest.mark.parametrize(
    ("columns", "damping", "dead"), [(1, 0.01, ()), (9, 0.01, ()), (30, 0.3, (3,)), (17, 1e-4, (0, 16))]
)
def test_the_factor_is_the_upper_root_of_the_damped_inverse(
    columns: int, damping: float, dead: tuple[int, ...]
) -> None:
    inputs = correlated(columns, 20, dead=dead)
    found = sparsegpt.factorize(Gram.of(inputs), damping=damping)
    hessian, literally_dead = literal_hessian(inputs, damping)
    assert found.upper.dtype == torch.float32
    assert torch.equal(found.upper, found.upper.triu())
    assert (found.upper.diagonal() > 0).all()
    upper = found.upper.double()
    torch.testing.assert_close(upper.t() @ upper @ hessian, torch.eye(columns).double(), rtol=0, atol=1e-3)
    assert found.dead.nonzero().flatten().tolist() == literally_dead == list(dead)


def test_running_statistics_have_nearly_the_same_factor() -> None:
    inputs = correlated(12, 21, sequences=5)
    first, *others = [RunningGram.of(sequence[None]) for sequence in inputs]
    for other in others:
        first = first.merge(other)
    torch.testing.assert_close(
        sparsegpt.factorize(first).upper, sparsegpt.factorize(Gram.of(inputs)).upper, rtol=1e-4, atol=1e-6
    )


def test_the_statistic_is_not_changed() -> None:
    inputs = correlated(6, 22, sequences=1, dead=(1,))
    gram, running = Gram.of(inputs), RunningGram.of(inputs)
    before = gram.total.clone(), running.mean.clone()
    sparsegpt.factorize(gram)
    sparsegpt.factorize(running)
    assert torch.equal(gram.total, before[0])
    assert torch.equal(running.mean, before[1])


def indefinite(excess: float) -> Gram:
    """Two inputs whose correlation is beyond 1 by `excess`: the least eigenvalue is -excess of the mean diagonal."""
    return Gram(torch.tensor([[1.0, 1 + excess], [1 + excess, 1.0]]), 1, 1)


@pytest.mark.parametrize(("excess", "retries"), [(-0.5, 0), (0.005, 0), (0.05, 1), (0.5, 2), (5.0, 3)])
def test_damping_grows_tenfold_with_a_warning_each_time(
    excess: float, retries: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = sparsegpt.factorize(indefinite(excess))
    assert found.upper.isfinite().all()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == retries, messages
    assert all("trying damping" in message and "float32" in message for message in messages)
    diagonal = 2 + 2 * 0.01 * 10**retries
    wanted = torch.linalg.inv(torch.tensor([[diagonal, 2 + 2 * excess], [2 + 2 * excess, diagonal]]).double())
    torch.testing.assert_close(found.upper.double().t() @ found.upper.double(), wanted, rtol=1e-3, atol=1e-3)


def test_float64_is_tried_when_float32_fails(caplog: pytest.LogCaptureFixture) -> None:
    one_direction = Gram(torch.full((2, 2), 2.0), 1, 1)  # a Hessian of fours, whose roots are exact
    with caplog.at_level(logging.WARNING):
        found = sparsegpt.factorize(one_direction, damping=1e-13)  # nothing beside 1 in float32
    assert found.upper.isfinite().all()
    assert found.upper.dtype == torch.float32
    messages = [record.getMessage() for record in caplog.records]
    assert ["float64" in message for message in messages] == [False] * 3 + [True], messages


def test_a_hessian_that_has_no_factor_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"no Cholesky factor in float64 with damping 10$"):
        sparsegpt.factorize(indefinite(50.0))
    assert len(caplog.records) == 7  # eight attempts


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hessian_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="values that are not finite"):
        sparsegpt.factorize(Gram(torch.full((3, 3), value), 1, 1))


# --- the static score ---


@given(rows=st.integers(1, 5), columns=st.integers(1, 8), seed=st.integers(0, 1000))
def test_the_score_is_the_error_of_removing_one_weight(rows: int, columns: int, seed: int) -> None:
    weight, inputs = normal(rows, columns, seed), correlated(columns, seed)
    inverse = torch.linalg.inv(literal_hessian(inputs, 0.1)[0])
    found = sparsegpt.score(weight, Gram.of(inputs), damping=0.1)
    wanted = [[float(weight[i, j]) ** 2 / float(inverse[j, j]) for j in range(columns)] for i in range(rows)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-3, atol=1e-9)


def test_the_score_of_a_dead_input_is_zero() -> None:
    score = sparsegpt.score(normal(3, 6, 23), Gram.of(correlated(6, 24, dead=(4,))))
    assert not score[:, 4].any()
    assert (score[:, :4] > 0).all()


# --- settings ---


@pytest.mark.parametrize("damping", [0.0, -0.01, math.nan, math.inf])
def test_damping_that_is_not_positive_is_refused(damping: float) -> None:
    gram = Gram.of(correlated(4, 25))
    with pytest.raises(ValueError, match=r"--set method\.damping: \S+ given, expected a positive number"):
        sparsegpt.factorize(gram, damping=damping)
    with pytest.raises(ValueError, match=r"--set method\.damping: "):
        sparsegpt.score(normal(2, 4, 0), gram, damping=damping)


@pytest.mark.parametrize("slab", [0, -128])
def test_a_slab_without_columns_is_refused(slab: int) -> None:
    with pytest.raises(ValueError, match=rf"--set method\.slab: {slab} given, expected at least 1"):
        solved(normal(2, 4, 0), correlated(4, 26), Quota(removed=3), slab=slab)


@pytest.mark.parametrize(
    "quota", [Quota(removed=-1), Quota(removed=33), Quota(removed=10, group=4), Quota(removed=8, group=3)]
)
def test_a_quota_that_does_not_fit_the_weight_is_our_own_mistake(quota: Quota) -> None:
    with pytest.raises(AssertionError):
        solved(normal(4, 8, 0), correlated(8, 27), quota)
