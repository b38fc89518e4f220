"""Does ALPS find what a literal transcription of its ADMM finds, keep every count, and come near the best values?"""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuronal_ray.algorithms.methods import Quota, alps
from neuronal_ray.core.stats import Gram

# --- the oracle: V, D and W as the paper prints them, an explicit inverse per iteration, selection by sorting ---


def keep_largest(values: Tensor, removed: int, group: int) -> Tensor:
    """`values` with the smallest of all, or of each group of inputs, set to zero; the lower flat index goes first."""
    flat = values.flatten().tolist()
    length = group or len(flat)
    goes = removed * length // len(flat)
    for first in range(0, len(flat), length):
        order = sorted(range(first, first + length), key=lambda index: (abs(flat[index]), index))
        for index in order[:goes]:
            flat[index] = 0.0
    return torch.tensor(flat, dtype=torch.float64).view_as(values)


def support_change(one: Tensor, other: Tensor) -> int:
    return sum((a == 0) != (b == 0) for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))


def literal_alps(
    weight: Tensor,
    gram: Tensor,
    removed: int,
    *,
    group: int = 0,
    damping: float = 0.01,
    rho: float = 0.1,
    iterations: int = 300,
    steps: int = 10,
) -> Tensor:
    """float64 throughout; [columns, rows] as in the paper turned to [rows, columns]."""
    gram = gram.double()
    size = len(gram)
    gram = gram + damping * (sum(float(gram[j, j]) for j in range(size)) / size) * torch.eye(size, dtype=torch.float64)
    scale = gram.diagonal().sqrt()
    gram = gram / scale[:, None] / scale[None, :]
    wanted = weight.double() * scale
    moments = wanted @ gram
    kept = weight.numel() - removed

    start = keep_largest(wanted, removed, group)
    w, d, v = wanted, start, torch.zeros_like(wanted)
    before, has_grown = start, False
    for iteration in range(iterations):
        inverse = torch.linalg.inv(gram + rho * torch.eye(size, dtype=torch.float64))
        w = (moments - v + rho * d) @ inverse
        d = keep_largest(w + v / rho, removed, group)
        v = v + rho * (w - d)
        if (iteration + 1) % 3 != 0:
            continue
        change = support_change(d, before)
        before = d
        if change > 0.1 * kept:
            rho, has_grown = rho * 1.3, True
        elif change > 0.005 * kept:
            rho, has_grown = rho * 1.2, True
        elif change > 0:
            if has_grown:
                rho = rho * 1.1
            else:
                rho, w, d, v = rho / 5, wanted, start, torch.zeros_like(wanted)
        elif has_grown:
            break
        else:
            rho = rho / 5
        rho = min(rho, 1e6)
        if iteration >= 30 and change < 0.0003 * kept:
            break
    w = keep_largest(w, removed, group)
    rows = [conjugate_gradients(w[i], moments[i], gram, steps) for i in range(len(w))]
    return torch.stack(rows) / scale


def conjugate_gradients(x: Tensor, b: Tensor, gram: Tensor, steps: int) -> Tensor:
    """The system that is left of gram * x = b when only the weights of x that are not zero may move."""
    free = [j for j in range(len(x)) if x[j] != 0]
    if not free:
        return x
    system, right, found = gram[free][:, free], b[free], x[free]
    residual = right - system @ found
    direction = residual
    for _ in range(steps):
        if residual.norm() <= 1e-4 * right.norm():
            break
        step = (residual @ residual) / (direction @ system @ direction)
        found = found + step * direction
        updated = residual - step * (system @ direction)
        direction = updated + (updated @ updated) / (residual @ residual) * direction
        residual = updated
    solved = torch.zeros_like(x)
    solved[free] = found
    return solved


# --- cases ---


def correlated(columns: int, seed: int, *, tokens: int | None = None, dead: tuple[int, ...] = ()) -> Tensor:
    """Inputs [1, tokens, columns] that share directions and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    mix = torch.randn(columns, columns, generator=generator) / torch.arange(1, columns + 1).sqrt()[:, None]
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    inputs = inputs + 0.3 * torch.randn(tokens, columns, generator=generator)
    inputs = inputs * torch.linspace(0.5, 2, columns)
    inputs[:, list(dead)] = 0
    return inputs[None]


def normal(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def layer_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||X W - X W'||^2 / ||X W||^2."""
    missed, gram = (weight - pruned).double(), gram.double()
    return float(((missed @ gram) * missed).sum() / ((weight.double() @ gram) * weight.double()).sum())


def zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


CASES = [
    (rows, columns, round(rate * rows * columns), seed)
    for seed, (rows, columns) in enumerate([(1, 8), (6, 8), (9, 5), (4, 24), (30, 12)])
    for rate in (0.3, 0.5, 0.7, 0.9)
]

# --- against the oracle ---


@pytest.mark.parametrize(("rows", "columns", "removed", "seed"), CASES)
def test_it_finds_what_the_oracle_finds(rows: int, columns: int, removed: int, seed: int) -> None:
    weight, gram = normal(rows, columns, seed), Gram.of(correlated(columns, seed))
    found = alps.solve(weight, alps.factorize(gram), Quota(removed=removed))
    wanted = literal_alps(weight, gram.total, removed)
    assert support_change(found, wanted) == 0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-3)  # rounding may add a step to a row


@pytest.mark.parametrize(("group", "removed"), [(4, 2), (4, 1), (8, 5), (8, 7)])
@pytest.mark.parametrize("rows", [2, 40])
def test_it_finds_what_the_oracle_finds_in_groups(group: int, removed: int, rows: int) -> None:
    columns = 16
    weight, gram = normal(rows, columns, group), Gram.of(correlated(columns, removed))
    quota = Quota(removed=rows * columns * removed // group, group=group)
    found = alps.solve(weight, alps.factorize(gram), quota)
    wanted = literal_alps(weight, gram.total, quota.removed, group=group)
    assert support_change(found, wanted) == 0
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-3)  # rounding may add a step to a row


@pytest.mark.parametrize(
    ("settings", "damping"),
    [
        ({"rho": 0.01}, 0.01),
        ({"rho": 20.0}, 0.01),  # little changes at first: new starts
        ({"rho": 1e4}, 0.01),
        ({"iterations": 0}, 0.01),
        ({"iterations": 1}, 0.01),
        ({"iterations": 7}, 0.1),
        ({"conjugate_steps": 0}, 0.01),
        ({"conjugate_steps": 1}, 0.3),
    ],
    ids=str,
)
def test_settings_mean_what_the_oracle_says(settings: dict[str, float], damping: float) -> None:
    weight, gram = normal(12, 10, 3), Gram.of(correlated(10, 3))
    found = alps.solve(weight, alps.factorize(gram, damping=damping), Quota(removed=70), **settings)
    renamed = {"steps" if name == "conjugate_steps" else name: value for name, value in settings.items()}
    wanted = literal_alps(weight, gram.total, 70, damping=damping, **renamed)
    assert support_change(found, wanted) == 0
    torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("rows", "columns", "removed", "seed", "iterations"),
    [
        (120, 40, 800, 1, 300),  # small changes at the end
        (160, 48, 800, 0, 300),  # ends after 30 iterations, while two weights still move
        (40, 24, 29, 3, 3),  # a new start, and nothing after it
        (40, 24, 29, 3, 4),  # one iteration from there
        (40, 24, 29, 3, 300),  # a new start, then growth
        (40, 24, 4, 1, 300),  # new starts until the end
        (40, 24, 2, 1, 300),  # no change at all
    ],
)
def test_it_goes_the_oracle_s_way_to_the_end(rows: int, columns: int, removed: int, seed: int, iterations: int) -> None:
    weight, gram = normal(rows, columns, seed), Gram.of(correlated(columns, seed))
    factor, quota = alps.factorize(gram), Quota(removed=removed)
    found = alps.solve(weight, factor, quota, iterations=iterations, conjugate_steps=0)
    wanted = literal_alps(weight, gram.total, removed, iterations=iterations, steps=0)
    assert support_change(found, wanted) == 0
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_one_and_two_factors_of_the_resolvent_are_the_same_matrix() -> None:
    gram = Gram.of(correlated(12, 0))
    factor = alps.factorize(gram)
    wanted = 0.1 * torch.linalg.inv(factor.gram.double() + 0.1 * torch.eye(12, dtype=torch.float64))
    for rows, number in ((4, 2), (5, 1)):
        factors = alps._resolvent(factor, 0.1, rows=rows)
        assert len(factors) == number
        product = functools.reduce(torch.matmul, factors)
        torch.testing.assert_close(product.double(), wanted, rtol=1e-4, atol=1e-5)


# --- how good it is ---


@pytest.mark.parametrize("rate", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_is_below_that_of_masks(rate: float, seed: int) -> None:
    rows, columns = 48, 64
    weight, gram = normal(rows, columns, seed), Gram.of(correlated(columns, seed))
    removed = round(rate * rows * columns)
    found = alps.solve(weight, alps.factorize(gram), Quota(removed=removed))
    error = layer_error(weight, found, gram.total)
    for score in (weight.abs(), alps.score(weight, gram)):
        masked = weight * (score > score.flatten().kthvalue(removed).values)
        assert zeros(masked) == removed
        assert error < 0.8 * layer_error(weight, masked, gram.total)


@pytest.mark.parametrize("seed", range(3))
def test_admm_chooses_a_better_support_than_the_one_it_starts_from(seed: int) -> None:
    weight, gram = normal(48, 64, seed), Gram.of(correlated(64, seed))
    factor, quota = alps.factorize(gram), Quota(removed=round(0.7 * weight.numel()))
    error, start = (
        layer_error(weight, alps.solve(weight, factor, quota, iterations=iterations, conjugate_steps=200), gram.total)
        for iterations in (300, 0)
    )
    assert error < 0.97 * start, (error, start)


@pytest.mark.parametrize("iterations", [0, 300])
def test_many_conjugate_steps_reach_the_least_squares_solution_on_the_support(iterations: int) -> None:
    weight, gram = normal(24, 32, 5), Gram.of(correlated(32, 5))
    factor, quota = alps.factorize(gram), Quota(removed=500)
    damped = factor.gram.double() * factor.scale.double() * factor.scale.double()[:, None]
    found = {
        steps: alps.solve(weight, factor, quota, iterations=iterations, conjugate_steps=steps) for steps in (0, 2, 200)
    }
    best = torch.zeros(24, 32, dtype=torch.float64)
    for row in range(24):
        free = (found[200][row] != 0).nonzero().flatten()
        best[row, free] = torch.linalg.solve(damped[free][:, free], (damped @ weight[row].double())[free])
    least = layer_error(weight, best, damped)
    excess = {steps: layer_error(weight, pruned, damped) / least - 1 for steps, pruned in found.items()}
    assert 0 <= excess[200] < 1e-5, excess
    assert excess[200] <= excess[2] <= excess[0], excess
    torch.testing.assert_close(found[200].double(), best, rtol=0, atol=1e-2)


# --- counts ---


@settings(max_examples=40)
@given(rows=st.integers(1, 7), columns=st.integers(1, 9), seed=st.integers(0, 50), part=st.floats(0, 1))
def test_exactly_as_many_weights_go_as_asked(rows: int, columns: int, seed: int, part: float) -> None:
    weight, gram = normal(rows, columns, seed), Gram.of(correlated(columns, seed))
    removed = round(part * rows * columns)
    found = alps.solve(weight, alps.factorize(gram), Quota(removed=removed))
    assert zeros(found) == removed
    assert found.dtype == torch.float32
    assert found.shape == weight.shape
    assert found.isfinite().all()


@pytest.mark.parametrize(("group", "removed"), [(4, 2), (4, 1), (8, 5), (8, 3)])
def test_every_group_keeps_its_number(group: int, removed: int) -> None:
    weight, gram = normal(10, 48, 0), Gram.of(correlated(48, 0))
    found = alps.solve(weight, alps.factorize(gram), Quota(removed=480 * removed // group, group=group))
    assert ((found.view(-1, group) == 0).sum(dim=1) == removed).all()


@pytest.mark.parametrize("group", [0, 4])
def test_nothing_and_everything(group: int) -> None:
    weight, gram = normal(6, 8, 0), Gram.of(correlated(8, 0, dead=(2,)))
    factor = alps.factorize(gram)
    untouched = alps.solve(weight, factor, Quota(removed=0, group=group))
    assert torch.equal(untouched, weight)
    untouched.zero_()
    assert zeros(weight) == 0
    assert zeros(alps.solve(weight, factor, Quota(removed=48, group=group))) == 48


@given(values=st.lists(st.integers(-3, 3), min_size=12, max_size=12), removed=st.integers(1, 11))
def test_of_equal_magnitudes_the_lower_index_goes_first(values: list[int], removed: int) -> None:
    tensor = torch.tensor(values, dtype=torch.float32).view(3, 4)
    order = sorted(range(12), key=lambda index: (abs(values[index]), index))
    stays = alps._support(tensor, Quota(removed=removed)).flatten().tolist()
    assert [index for index in range(12) if not stays[index]] == sorted(order[:removed])
    by_group = alps._support(tensor, Quota(removed=6, group=2)).view(-1, 2).tolist()
    pairs = torch.tensor(values).abs().view(-1, 2).tolist()
    assert by_group == [[first > second, first <= second] for first, second in pairs]


@given(
    values=st.lists(st.floats(0, 2.0**127, width=32) | st.sampled_from([0.0, 1.0, 2.0**-149, 3.4e38]), min_size=1),
    data=st.data(),
)
def test_the_kth_value_is_that_of_the_sorted_list(values: list[float], data: st.DataObject) -> None:
    position = data.draw(st.integers(1, len(values)))
    magnitude = torch.tensor(values)
    assert alps._kth_value(magnitude, position) == sorted(magnitude.tolist())[position - 1]


# --- what must not matter, and what must ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arguments_stay_and_results_repeat(dtype: torch.dtype) -> None:
    weight, gram = normal(10, 16, 0).to(dtype), Gram.of(correlated(16, 0))
    factor = alps.factorize(gram)
    before = weight.clone(), gram.total.clone(), {name: value.clone() for name, value in vars(factor).items()}
    found = alps.solve(weight, factor, Quota(removed=100))
    again = alps.solve(weight, alps.factorize(gram), Quota(removed=100))
    assert torch.equal(found, again)
    assert torch.equal(weight, before[0])
    assert torch.equal(gram.total, before[1])
    assert all(torch.equal(getattr(factor, name), value) for name, value in before[2].items())
    assert torch.equal(found, alps.solve(weight.float(), factor, Quota(removed=100)))
    assert torch.equal(found, alps.solve(weight.t().contiguous().t(), factor, Quota(removed=100)))


@pytest.mark.parametrize("constant", [2.0**-10, 1e-3, 7.0, 2.0**20])
def test_the_scale_of_the_inputs_does_not_matter(constant: float) -> None:
    weight, inputs = normal(10, 16, 1), correlated(16, 1)
    found, scaled = (
        alps.solve(weight, alps.factorize(Gram.of(x)), Quota(removed=110)) for x in (inputs, inputs * constant)
    )
    assert support_change(found, scaled) == 0
    torch.testing.assert_close(found, scaled, rtol=2e-3, atol=2e-4)


def test_a_row_depends_on_no_other_given_the_support_of_groups() -> None:
    """With groups and a fixed number of iterations before the first check, rows share nothing."""
    weight, gram = normal(6, 16, 2), Gram.of(correlated(16, 2))
    factor = alps.factorize(gram)
    whole = alps.solve(weight, factor, Quota(removed=48, group=4), iterations=2)
    single = alps.solve(weight[3:4], factor, Quota(removed=8, group=4), iterations=2)
    torch.testing.assert_close(whole[3:4], single, rtol=1e-3, atol=1e-5)


def test_zeros_go_and_a_solved_weight_is_left_alone() -> None:
    weight, gram = normal(10, 16, 4), Gram.of(correlated(16, 4))
    factor, quota = alps.factorize(gram), Quota(removed=100)
    once = alps.solve(weight, factor, quota)
    assert torch.equal(alps.solve(once, factor, quota), once)
    assert torch.equal(alps.solve(once, factor, Quota(removed=40)), once)
    assert zeros(alps.solve(once, factor, Quota(removed=120))) == 120


# --- dead inputs ---


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(("removed", "found_zeros"), [(10, 24), (24, 24), (60, 60)])
def test_weights_of_dead_inputs_go_and_count(damping: float, removed: int, found_zeros: int) -> None:
    dead = (1, 6, 7)
    weight, gram = normal(8, 12, 0), Gram.of(correlated(12, 0, dead=dead))
    found = alps.solve(weight, alps.factorize(gram, damping=damping), Quota(removed=removed))
    assert zeros(found[:, list(dead)]) == 24
    assert zeros(found) == found_zeros
    alive = [column for column in range(12) if column not in dead]
    if removed <= 24:
        assert torch.equal(found[:, alive], weight[:, alive])


def test_dead_inputs_change_nothing_for_the_others() -> None:
    inputs = correlated(10, 6)
    padded = torch.cat([inputs, torch.zeros(1, inputs.shape[1], 5)], dim=2)
    weight = normal(7, 15, 6)
    without = alps.solve(weight[:, :10], alps.factorize(Gram.of(inputs), damping=0.01), Quota(removed=40))
    found = alps.solve(weight, alps.factorize(Gram.of(padded), damping=0.015), Quota(removed=40 + 35))
    assert support_change(found[:, :10], without) == 0  # the mean diagonal falls by a third: damping makes up for it
    torch.testing.assert_close(found[:, :10], without, rtol=2e-3, atol=2e-4)


def test_dead_inputs_fill_groups_first() -> None:
    weight, gram = normal(8, 8, 0), Gram.of(correlated(8, 0, dead=(0, 1, 2, 5)))
    found = alps.solve(weight, alps.factorize(gram), Quota(removed=32, group=4))
    assert (found[:, [0, 1, 2, 5]] == 0).all()
    assert ((found[:, 4:] == 0).sum(dim=1) == 2).all()
    assert (found[:, 3] != 0).all()


def test_inputs_that_are_all_dead_leave_zeros() -> None:
    factor = alps.factorize(Gram.of(torch.zeros(1, 4, 6)))
    assert zeros(alps.solve(normal(3, 6, 0), factor, Quota(removed=2))) == 18


# --- factor, score and bad input ---


def test_the_factor_is_the_scaled_damped_gram_matrix_and_its_spectrum() -> None:
    gram = Gram.of(correlated(9, 0, dead=(4,)))
    factor = alps.factorize(gram, damping=0.05)
    damped = gram.total.double() + 0.05 * gram.total.double().diagonal().mean() * torch.eye(9, dtype=torch.float64)
    scale = damped.diagonal().sqrt()
    torch.testing.assert_close(factor.scale.double(), scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(factor.gram.double(), damped / scale / scale[:, None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(factor.gram.diagonal(), torch.ones(9))
    assert factor.dead.tolist() == [column == 4 for column in range(9)]
    rebuilt = (factor.eigenvectors * factor.eigenvalues) @ factor.eigenvectors.t()
    wanted = factor.gram.clone()
    wanted[4, 4] = 0
    torch.testing.assert_close(rebuilt, wanted, rtol=1e-4, atol=1e-5)


def test_the_factor_cannot_be_changed() -> None:
    factor = alps.factorize(Gram.of(correlated(4, 0)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        factor.scale = torch.ones(4)


def failing_below(dtype: torch.dtype, *, how: str) -> functools.partial[tuple[Tensor, Tensor]]:
    """`torch.linalg.eigh` that works in `dtype` only."""
    return functools.partial(_eigh, torch.linalg.eigh, dtype, how)


def _eigh(real: object, dtype: torch.dtype, how: str, matrix: Tensor) -> tuple[Tensor, Tensor]:
    assert callable(real)
    if matrix.dtype == dtype:
        values, vectors = real(matrix)
        return values, vectors
    if how == "raises":
        raise torch.linalg.LinAlgError("did not converge")
    return torch.full_like(matrix[0], torch.nan), matrix


@pytest.mark.parametrize("how", ["raises", "returns NaN"])
def test_float64_helps_where_float32_fails(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    gram = Gram.of(correlated(12, 0))
    wanted = alps.solve(normal(5, 12, 0), alps.factorize(gram), Quota(removed=30))
    monkeypatch.setattr(torch.linalg, "eigh", failing_below(torch.float64, how=how))
    factor = alps.factorize(gram)
    assert factor.eigenvalues.dtype == factor.eigenvectors.dtype == torch.float32
    torch.testing.assert_close(alps.solve(normal(5, 12, 0), factor, Quota(removed=30)), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["raises", "returns NaN"])
def test_a_matrix_that_cannot_be_decomposed_is_an_error(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", failing_below(torch.float16, how=how))
    with pytest.raises(ValueError, match=r"^--method alps: .*--set method\.damping"):
        alps.factorize(Gram.of(correlated(4, 0)))


def test_activations_that_are_not_finite_are_an_error() -> None:
    inputs = correlated(4, 0)
    inputs[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^--method alps: "):
        alps.factorize(Gram.of(inputs))


def test_the_score_is_wanda_s() -> None:
    weight, inputs = normal(3, 5, 0), correlated(5, 0)
    norms = [sum(float(x) ** 2 for x in inputs[0, :, column]) ** 0.5 for column in range(5)]
    wanted = [[abs(float(weight[row, column])) * norms[column] for column in range(5)] for row in range(3)]
    torch.testing.assert_close(alps.score(weight, Gram.of(inputs)), torch.tensor(wanted))


def test_the_score_orders_a_row_as_the_solver_s_start_does_without_damping() -> None:
    weight, gram = normal(1, 12, 0), Gram.of(correlated(12, 0))
    factor = alps.factorize(gram, damping=0.0)
    start = alps.solve(weight, factor, Quota(removed=7), iterations=0, conjugate_steps=0)
    gone = alps.score(weight, gram)[0].argsort()[:7]
    assert sorted(gone.tolist()) == (start[0] == 0).nonzero().flatten().tolist()
    torch.testing.assert_close(start[start != 0], weight[start != 0])


def test_no_eigenvalue_is_negative_where_the_inputs_are_fewer_than_the_columns() -> None:
    factor = alps.factorize(Gram.of(correlated(40, 0, tokens=3)), damping=0.0)
    assert (factor.eigenvalues >= 0).all()
    assert int((factor.eigenvalues > 1e-3).sum()) == 3


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_damping_out_of_range_is_refused(damping: float) -> None:
    with pytest.raises(ValueError, match=r"^--set method\.damping: "):
        alps.factorize(Gram.of(correlated(4, 0)), damping=damping)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rho", 0.0),
        ("rho", -1.0),
        ("rho", float("nan")),
        ("rho", float("inf")),
        ("iterations", -1),
        ("conjugate_steps", -1),
    ],
)
@pytest.mark.parametrize("removed", [0, 5])
def test_settings_out_of_range_are_refused(name: str, value: float, removed: int) -> None:
    factor = alps.factorize(Gram.of(correlated(4, 0)))
    with pytest.raises(ValueError, match=rf"^--set method\.{name}: "):
        alps.solve(normal(3, 4, 0), factor, Quota(removed=removed), **{name: value})


def test_the_released_code_s_count_is_refused() -> None:
    factor = alps.factorize(Gram.of(correlated(4, 0)))
    with pytest.raises(ValueError, match="--method alps: not in the released code; use --mode paper"):
        alps.solve(normal(3, 4, 0), factor, Quota(removed=6, rate=0.5))
