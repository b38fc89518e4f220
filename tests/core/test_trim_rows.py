"""TRIM's row rates equal the formula on the tokens, and are exact, bounded and never worse than the start."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.plan import exact_plan
from neuronal_ray.core.trim_rows import Similarity, similarity, trim_rows


class Case:
    """A linear, its inputs with their features correlated, and a uniform start."""

    def __init__(self, seed: int, *, rows: int = 7, columns: int = 12, rate: float = 0.6, tokens: int = 40) -> None:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=generator)
        scales = torch.rand(columns, generator=generator) * 2
        self.inputs = (torch.randn(tokens, columns, generator=generator) @ mixing) * scales + 0.5
        spread = torch.rand(rows, 1, generator=generator) * 4 + 0.1
        self.weight = torch.randn(rows, columns, generator=generator).sign() * (
            torch.rand(rows, columns, generator=generator) ** spread
        )
        self.gram = self.inputs.t() @ self.inputs
        self.ranks = rank_rows(self.weight.abs() * self.inputs.norm(dim=0))
        each, more = divmod(round(rate * rows * columns), rows)
        self.removed = each + (torch.arange(rows) < more).int()

    def trim(self, **settings: object) -> Tensor:
        return trim_rows(self.weight, self.gram, self.ranks, self.removed, **settings)

    def counts(self, rates: Tensor) -> Tensor:
        return (rates * self.weight.shape[1]).round().int()


def outputs(case: Case, removed: list[int] | None) -> list[list[float]]:
    """Each row's output for each token, in float64, of the dense linear or of the cut one."""
    weight, inputs, ranks = case.weight.double().tolist(), case.inputs.double().tolist(), case.ranks.tolist()
    result = []
    for i, row in enumerate(weight):
        kept = [w if removed is None or ranks[i][j] >= removed[i] else 0.0 for j, w in enumerate(row)]
        result.append([sum(w * x for w, x in zip(kept, token, strict=True)) for token in inputs])
    return result


def cosine(one: list[float], other: list[float]) -> float:
    a, b = math.sqrt(sum(x * x for x in one)), math.sqrt(sum(y * y for y in other))
    if a == 0 or b == 0:
        return float(a == b)
    return sum(x * y for x, y in zip(one, other, strict=True)) / (a * b)


def literal_similarity(case: Case, removed: list[int]) -> tuple[list[float], float]:
    dense, sparse = outputs(case, None), outputs(case, removed)
    rows = [cosine(one, other) for one, other in zip(dense, sparse, strict=True)]
    return rows, cosine([y for row in dense for y in row], [y for row in sparse for y in row])


def literal_recentered(rates: list[float], mean: float, bound: float) -> list[float]:
    """One offset for all, found by halving, such that the bounded rates have the mean."""
    low, high = -2.0, 2.0
    for _ in range(200):
        offset = (low + high) / 2
        moved = [min(max(rate + offset, 0.0), bound) for rate in rates]
        low, high = (offset, high) if sum(moved) / len(moved) < mean else (low, offset)
    return moved


def literal_counts(rates: list[float], columns: int, total: int) -> list[int]:
    counts = [math.floor(round(rate * columns, 6)) for rate in rates]
    while sum(counts) < total:
        remainders = [round(rate * columns - count, 6) for rate, count in zip(rates, counts, strict=True)]
        counts[remainders.index(max(remainders))] += 1
    return counts


def literal_trim(case: Case, widths: list[float], reversed_widths: list[float], iterations: int) -> list[int]:
    columns = case.weight.shape[1]
    start: list[int] = case.removed.tolist()
    total, rows = sum(start), len(start)
    bound = max(math.floor(0.95 * columns), max(start)) / columns
    best_counts, best = start, literal_similarity(case, start)[1]
    helped = False
    for sign, group in ((1, widths), (-1, reversed_widths)):
        last = None
        for width in group:
            x = [count / columns for count in start]
            counts, width_best, width_counts = start, literal_similarity(case, start)[1], start
            for _ in range(iterations):
                q = literal_similarity(case, counts)[0]
                d = [sign * 2 * width * (value - min(q)) / (max(q) - min(q) + 1e-6) for value in q]
                x = [min(max(x[i] + d[i] - sum(d) / rows, 0.0), bound) for i in range(rows)]
                x = literal_recentered(x, total / (rows * columns), bound)
                counts = literal_counts(x, columns, total)
                reached = literal_similarity(case, counts)[1]
                if reached > width_best:
                    width_best, width_counts = reached, counts
            if width_best > best:
                best, best_counts, helped = width_best, width_counts, True
            if last is not None and width_best <= last:
                break
            last = width_best
        if helped:
            break
    return best_counts


def judged(case: Case, counts: Tensor) -> Similarity:
    dense = case.weight @ case.gram
    pruned = case.weight * (case.ranks >= counts[:, None])
    return similarity(dense, (dense * case.weight).sum(dim=1).double(), pruned, case.gram)


@pytest.mark.parametrize("seed", range(6))
def test_the_cosines_are_those_of_the_outputs_over_the_tokens(seed: int) -> None:
    case = Case(seed)
    removed = torch.randint(0, 13, (7,), generator=torch.Generator().manual_seed(seed)).int()
    rows, whole = literal_similarity(case, removed.tolist())
    found = judged(case, removed)
    assert found.rows.tolist() == pytest.approx(rows, abs=1e-5)
    assert found.whole == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("rate", [0.3, 0.6, 0.85])
@pytest.mark.parametrize("seed", range(5))
def test_the_rates_are_those_of_the_formula_on_the_tokens(seed: int, rate: float) -> None:
    case = Case(seed, rate=rate)
    widths, reversed_widths = [0.02, 0.08, 0.16], [0.02, 0.04]
    found = case.trim(widths=widths, reversed_widths=reversed_widths, iterations=3)
    assert case.counts(found).tolist() == literal_trim(case, widths, reversed_widths, 3)


@pytest.mark.parametrize("seed", [0, 7])
def test_steps_past_both_bounds_are_bounded_before_the_shift_to_the_mean(seed: int) -> None:
    case = Case(seed, rate=0.6)
    found = case.trim(widths=[0.6], reversed_widths=[0.6], iterations=3)
    assert case.counts(found).tolist() == literal_trim(case, [0.6], [0.6], 3)


def test_both_signs_of_the_width_win_somewhere_in_the_cases_of_the_formula() -> None:
    """Else the test above would not see what one of them does."""
    cases = [Case(seed, rate=rate) for seed in range(5) for rate in (0.3, 0.6, 0.85)]
    forward = [
        not torch.equal(case.counts(case.trim(reversed_widths=[], iterations=3)), case.removed) for case in cases
    ]
    either = [not torch.equal(case.counts(case.trim(iterations=3)), case.removed) for case in cases]
    assert 0 < sum(forward) < sum(either), (forward, either)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    columns=st.integers(1, 15),
    rate=st.floats(0, 1),
    highest=st.floats(0.05, 1),
)
def test_the_budget_is_exact_and_bounded_and_the_outputs_never_further_off(
    seed: int, rows: int, columns: int, rate: float, highest: float
) -> None:
    case = Case(seed, rows=rows, columns=columns, rate=rate)
    rates = case.trim(highest=highest, iterations=3)
    counts = case.counts(rates)
    assert rates.dtype == torch.float64
    assert rates.shape == (rows,)
    assert torch.equal(counts.double() / columns, rates), rates
    assert int(counts.sum()) == int(case.removed.sum())
    most = max(math.floor(highest * columns), int(case.removed.max()))
    assert int(counts.min()) >= 0
    assert int(counts.max()) <= most, (counts, most)
    assert judged(case, counts).whole >= judged(case, case.removed).whole
    assert torch.equal(case.trim(highest=highest, iterations=3), rates)


def test_correlated_inputs_let_some_rows_lose_more() -> None:
    """Half of the rows have one large weight, the others have equal ones: at 75 % only the latter suffer."""
    rows, columns = 16, 32
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(200, 1, generator=generator)
    inputs = common + 0.3 * torch.randn(200, columns, generator=generator)
    weight = torch.full((rows, columns), 0.01)
    weight[::2, 0] = 1.0
    weight[1::2] = 0.3 + 0.1 * torch.rand(rows // 2, columns, generator=generator)
    weight[1::2, ::2] *= -1
    case = Case(0, rows=rows, columns=columns, rate=0.75)
    case.inputs, case.weight, case.gram = inputs, weight, inputs.t() @ inputs
    case.ranks = rank_rows(weight.abs() * inputs.norm(dim=0))
    rates = case.trim()
    before, after = judged(case, case.removed).whole, judged(case, case.counts(rates)).whole
    assert after > before + 0.05, (before, after)
    assert float(rates[::2].mean()) > float(rates[1::2].mean()), rates


def test_a_start_above_the_bound_stays_where_it_is() -> None:
    case = Case(3, rows=5, columns=100, rate=0.97)
    assert case.trim().tolist() == [0.97] * 5


def test_a_start_that_differs_between_rows_is_the_start() -> None:
    case = Case(1, rows=4, columns=10)
    case.removed = torch.tensor([10, 2, 3, 9]).int()
    counts = case.counts(case.trim())
    assert int(counts.sum()) == 24
    assert judged(case, counts).whole >= judged(case, case.removed).whole


def test_rows_without_output_give_no_nan_and_lose_the_most() -> None:
    case = Case(2, rows=6, columns=20, rate=0.5)
    case.weight[2] = 0.0
    case.ranks = rank_rows(case.weight.abs() * case.inputs.norm(dim=0))
    rates = case.trim()
    assert bool(rates.isfinite().all())
    assert float(rates[2]) == float(rates.max()) > 0.5, rates


def test_two_outputs_of_zeros_are_alike_and_one_is_not() -> None:
    zero, some = torch.zeros(1, 2), torch.tensor([[1.0, 2.0]])
    gram = torch.eye(2)

    def rows(dense: Tensor, pruned: Tensor) -> list[float]:
        weight = torch.cat([dense, some])
        found = similarity(weight @ gram, weight.square().sum(dim=1).double(), torch.cat([pruned, some]), gram)
        assert math.isfinite(found.whole)
        return found.rows.tolist()

    assert rows(zero, zero) == pytest.approx([1, 1])
    assert rows(zero, some) == pytest.approx([0, 1])
    assert rows(some, zero) == pytest.approx([0, 1])


def test_a_squared_norm_that_rounding_made_negative_is_zero() -> None:
    some, gram = torch.tensor([[1.0, 2.0]]), -1e-9 * torch.eye(2)
    found = similarity(some, some.square().sum(dim=1).double(), some, gram)
    assert found.rows.tolist() == [0.0]
    assert found.whole == 0.0


def test_inputs_of_zeros_leave_the_start() -> None:
    case = Case(0)
    assert torch.equal(
        trim_rows(case.weight, torch.zeros(12, 12), case.ranks, case.removed), case.removed.double() / 12
    )


def test_an_exact_plan_of_the_rates_has_the_same_counts() -> None:
    case = Case(4, rows=30, columns=50, rate=0.7)
    linear = Linear(0, "one")
    spec = LinearSpec(linear=linear, rows=30, columns=50, reads=Group(0, 0), consumer=None, sources=None)
    rates = case.trim()
    assert not torch.equal(case.counts(rates), case.removed)
    plan = exact_plan(Layout((spec,)), {linear: rates}, target=0.7)
    assert torch.equal(plan.removed[linear], case.counts(rates))


def test_half_precision_weights_are_judged_in_float32() -> None:
    case = Case(5)
    case.weight = case.weight.bfloat16().float()
    exact = case.trim()
    assert torch.equal(trim_rows(case.weight.bfloat16(), case.gram, case.ranks, case.removed), exact)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({"widths": (0.1, 0.0)}, "widths"),
        ({"reversed_widths": (-0.1,)}, "widths"),
        ({"iterations": 0}, "iterations is 0"),
        ({"highest": 0.0}, "highest is 0.0"),
        ({"highest": 1.1}, "highest is 1.1"),
    ],
)
def test_bad_settings_are_refused(given_settings: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Case(0).trim(**given_settings)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_inputs_that_are_not_finite_are_refused(value: float) -> None:
    case = Case(0)
    case.gram[3, 3] = value
    with pytest.raises(BadInput, match="NaN or infinite activations"):
        case.trim()
