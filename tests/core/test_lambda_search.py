"""The row step follows its formula after any allocation, and the continuous search finds its minimum."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.lambda_search import Found, row_rates, search_lambdas, search_rows
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.pattern import Pattern
from neuronal_ray.core.plan import Plan, Rates, exact_plan, uniform_rates
from neuronal_ray.core.problem import Problem

Score = Callable[[float], float]

COLUMNS = {0: 8, 1: 12}
"""Of the two groups of each block: "key" and "up" read the first, "down" the second."""


def spec_of(block: int, path: str, rows: int, reads: int, consumer: Group | None, fan: bool = False) -> LinearSpec:
    sources = torch.tensor([[0, 3], [1, 4], [2, 5], [6, 7]]) if fan else None
    return LinearSpec(
        linear=Linear(block, path),
        rows=rows,
        columns=COLUMNS[reads],
        reads=Group(block, reads),
        consumer=consumer,
        sources=sources,
    )


LAYOUT = Layout(
    tuple(
        spec
        for block in range(3)
        for spec in (
            spec_of(block, "key", 4, 0, Group(block, 1), fan=True),
            spec_of(block, "up", 12, 0, Group(block, 1)),
            spec_of(block, "down", 8, 1, Group(block + 1, 0) if block < 2 else None),
        )
    )
)


def signals(seed: int) -> dict[Group, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.randn(COLUMNS[group.index], generator=generator) for group in LAYOUT.groups}


class FakeProbe:
    """Trials whose misalignment is `score(lam)`; keeps what it was asked."""

    def __init__(self, score: Score) -> None:
        self.score = score
        self.asked: list[tuple[str, list[float]]] = []

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        assert len(lambdas) == len(plans) > 0
        self.asked.append((step, list(lambdas)))
        return [Trial(misalignment=self.score(lam), signals=signals(0)) for lam in lambdas]


def problem_of(score: Score = lambda lam: lam, *, mode: str = "paper", pattern: Pattern | None = None) -> Problem:
    return Problem(layout=LAYOUT, target=0.6, mode=mode, probe=FakeProbe(score), pattern=pattern)


def some_rates(seed: int, *, per_row: bool) -> Rates:
    generator = torch.Generator().manual_seed(seed)
    return {
        spec.linear: (torch.rand(spec.rows if per_row else 1, generator=generator, dtype=torch.float64) + 0.3)
        .clamp(0.35, 0.95)
        .expand(spec.rows)
        for spec in LAYOUT
    }


# -- the rates of rows


def literal_rows(mode: str, rates: Rates, shrunk: dict[Group, torch.Tensor], lam: float) -> dict[Linear, list[float]]:
    """Each row moves against its consumer's shrinkage, scaled to a width of 2 lam around 0."""
    found = {}
    for spec in LAYOUT:
        rows = rates[spec.linear].tolist()
        last, grouped = spec.linear.block == 2, spec.linear.path in ("key", "up")  # up reads with a grouped sibling
        if spec.consumer is None or (mode == "authors" and (last or grouped)):
            found[spec.linear] = rows
            continue
        signal = shrunk[spec.consumer].tolist()
        levels = signal
        if spec.sources is not None:
            levels = [sum(signal[column] for column in fan) / len(fan) for fan in spec.sources.tolist()]
        low, high = min(levels), max(levels)
        scaled = [0.0 if low == high else (level - low) / (high - low) * 2 * lam for level in levels]
        mean = sum(scaled) / len(scaled)
        moved = [rate - (part - mean) for rate, part in zip(rows, scaled, strict=True)]
        found[spec.linear] = [min(0.99, max(0.01, rate)) for rate in moved] if mode == "authors" else moved
    return found


@pytest.mark.parametrize("mode", ["paper", "authors"])
@pytest.mark.parametrize("per_row", [False, True])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), lam=st.floats(0, 0.6))
def test_rows_move_against_the_shrinkage_of_their_reader(mode: str, per_row: bool, seed: int, lam: float) -> None:
    rates, winner = some_rates(seed, per_row=per_row), Trial(misalignment=1.0, signals=signals(seed))
    moved = row_rates(problem_of(mode=mode), rates, winner, lam)
    for linear, expected in literal_rows(mode, rates, dict(winner.signals), lam).items():
        assert moved[linear].dtype == torch.float64
        assert moved[linear].tolist() == pytest.approx(expected, abs=1e-6), linear


@pytest.mark.parametrize("per_row", [False, True])
def test_lambda_0_changes_nothing(per_row: bool) -> None:
    rates = some_rates(1, per_row=per_row)
    moved = row_rates(problem_of(), rates, Trial(misalignment=1.0, signals=signals(1)), 0.0)
    for linear, rate in rates.items():
        assert moved[linear].tolist() == pytest.approx(rate.tolist(), abs=1e-15)


def test_equal_signals_leave_the_rows_alone() -> None:
    flat = {group: torch.full((COLUMNS[group.index],), 3.0) for group in LAYOUT.groups}
    rates = some_rates(1, per_row=False)
    moved = row_rates(problem_of(), rates, Trial(misalignment=1.0, signals=flat), 0.2)
    for linear, rate in rates.items():
        assert moved[linear].tolist() == pytest.approx(rate.tolist(), abs=1e-15)


# -- the step


def step_after(problem: Problem, rates: Rates, winner: Trial | None = None, **options: str) -> Found:
    plan = problem.plan(rates, rows_adapted=False)
    return search_rows(problem, rates, plan, winner, (0.0, 0.1, 0.2), **options)


def probe_of(problem: Problem) -> FakeProbe:
    assert isinstance(problem.probe, FakeProbe)
    return problem.probe


@pytest.mark.parametrize("per_row", [False, True])
def test_the_step_follows_any_rates_and_keeps_the_budget(per_row: bool) -> None:
    problem = problem_of(lambda lam: abs(lam - 0.1))
    rates = some_rates(2, per_row=per_row)
    found = step_after(problem, rates)
    assert (found.step.name, found.step.lambdas, found.step.selected) == ("row", (0.0, 0.1, 0.2), 0.1)
    assert found.trial.misalignment == 0.0
    expected = row_rates(problem, rates, Trial(misalignment=0.0, signals=signals(0)), 0.1)
    assert all(torch.equal(rate, found.rates[linear]) for linear, rate in expected.items())
    assert found.plan.digest == problem.plan(expected, rows_adapted=True).digest
    assert found.plan.total == round(0.6 * LAYOUT.prunable)


def test_the_plan_is_tried_first_where_its_trial_is_not_given() -> None:
    problem = problem_of()
    step_after(problem, some_rates(2, per_row=False))
    assert probe_of(problem).asked == [("before rows", [1.0]), ("row", [0.0, 0.1, 0.2])]
    problem = problem_of()
    step_after(problem, some_rates(2, per_row=False), Trial(misalignment=0.0, signals=signals(0)))
    assert probe_of(problem).asked == [("row", [0.0, 0.1, 0.2])]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_trial_that_overflowed_is_refused(value: float) -> None:
    broken = signals(0)
    broken[Group(1, 1)][3] = value
    with pytest.raises(ValueError, match=r"^--model: NaN or infinite activations in the pruned model, rows cannot be"):
        step_after(problem_of(), some_rates(2, per_row=False), Trial(misalignment=1.0, signals=broken))


def test_a_pattern_has_no_rows_to_adapt() -> None:
    problem = problem_of(pattern=Pattern(None, 4))
    with pytest.raises(ValueError, match=r"^--pattern: leaves no choice between the rows of a linear, expected no row"):
        step_after(problem, some_rates(2, per_row=False))
    assert not probe_of(problem).asked


# -- the search over lambdas

PAIR = Layout(tuple(spec_of(block, "up", 12, 0, None) for block in range(2)))


def searched(score: Score, lambdas: Sequence[float], search: str) -> tuple[Found, list[list[float]]]:
    """Return the result, and the lambdas of each call of the probe."""
    problem = Problem(layout=PAIR, target=0.6, mode="paper", probe=FakeProbe(score))
    rates_of = partial(constant, problem)
    found = search_lambdas(problem, "block", lambdas, rates_of, rows_adapted=False, search=search)
    return found, [asked for _, asked in probe_of(problem).asked]


def constant(problem: Problem, lam: float) -> Rates:
    """Lambda itself as the rate of the second block."""
    return uniform_rates(problem.layout, lambda block: lam if block == 1 else 0.6)


def assert_consistent(found: Found, score: Score) -> None:
    step = found.step
    assert list(step.scores) == [score(lam) for lam in step.lambdas]
    assert step.selected == min(step.lambdas, key=score)  # min keeps the first of equals
    assert found.trial.misalignment == min(step.scores)
    assert float(found.rates[Linear(1, "up")][0]) == step.selected
    assert found.plan.digest == exact_plan(PAIR, found.rates, target=0.6).digest


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16), st.integers(0, 5))
def test_a_set_is_tried_as_it_stands_in_one_call(lambdas: list[float], levels: int) -> None:
    def score(lam: float) -> float:
        return float(hash(lam) % (levels + 1))

    found, calls = searched(score, lambdas, "set")
    assert calls == [lambdas]
    assert_consistent(found, score)


def literal_search(score: Score, lambdas: Sequence[float]) -> list[float]:
    """Return the lambdas that the continuous search tries: five of the set, then four at a time around the best."""
    ordered = sorted(set(lambdas))
    tried = ordered
    if len(ordered) > 5:
        tried = [ordered[round(quarter * (len(ordered) - 1) / 4)] for quarter in range(5)]
    while len(tried) < len(lambdas):
        best = min(tried, key=score)
        left = max([0.0] + [lam for lam in tried if lam < best])
        right = min([max(lambdas)] + [lam for lam in tried if lam > best])
        wider_above = round(right - best, 6) > round(best - left, 6)
        below, above = 0, 0
        for _ in range(min(4, len(lambdas) - len(tried))):  # one more to the side with fewer, or else to the wider
            if best == left or (best != right and (above < below or (above == below and wider_above))):
                above += 1
            else:
                below += 1
        below, above = (0 if best == left else below), (0 if best == right else above)
        points = [left + (best - left) * part / (below + 1) for part in range(1, below + 1)]
        points += [best + (right - best) * part / (above + 1) for part in range(1, above + 1)]
        new = sorted({round(point, 6) for point in points} - {0.0, max(lambdas), *tried})
        if not new:
            break
        tried = tried + new
    return tried


VALLEYS = st.builds(lambda lowest, steep: lambda lam: steep * abs(lam - lowest), st.floats(0, 0.3), st.floats(0.1, 9))
CUT_VALLEYS = st.builds(
    lambda lowest, cut: lambda lam: math.inf if lam > cut else (lam - lowest) ** 2, st.floats(0, 0.3), st.floats(0, 0.3)
)
WAVES = st.builds(lambda speed: lambda lam: math.sin(speed * lam), st.floats(1, 300))
STEPS = st.builds(lambda width: lambda lam: float(lam // width), st.floats(0.01, 0.2))
SCORES = st.one_of(VALLEYS, CUT_VALLEYS, WAVES, STEPS, st.just(lambda _: math.inf), st.just(lambda _: 1.0))
SETS = st.one_of(
    st.sampled_from([LAMBDAS, ROW_LAMBDAS, (0.1,), (0.0,), (0.0, 0.0), (0.2, 0.1)]),
    st.lists(st.integers(0, 100).map(lambda percent: percent / 100), min_size=1, max_size=20),
)


@settings(max_examples=100, deadline=None)
@given(SCORES, SETS)
def test_a_continuous_search_tries_what_its_rule_says_and_no_more_than_the_set(
    score: Score, lambdas: Sequence[float]
) -> None:
    found, calls = searched(score, lambdas, "continuous")
    assert_consistent(found, score)
    tried = list(found.step.lambdas)
    assert tried == [lam for asked in calls for lam in asked]  # in the order of evaluation
    assert len(tried) == len(set(tried)) <= len(lambdas)
    assert all(0 <= lam <= max(lambdas) for lam in tried)
    assert [len(asked) for asked in calls[1:-1]] == [4] * len(calls[1:-1])
    assert len(calls[0]) <= 5
    assert tried == pytest.approx(literal_search(score, lambdas), abs=2e-6)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 0.25), st.floats(0.1, 10))
def test_a_continuous_search_comes_closer_to_a_lone_minimum_than_a_twentieth_of_the_range(
    lowest: float, steep: float
) -> None:
    found, calls = searched(lambda lam: steep * abs(lam - lowest), LAMBDAS, "continuous")
    assert abs(found.step.selected - lowest) <= 0.25 / 20
    assert [len(asked) for asked in calls] == [5, 4, 4, 1]


def test_it_finds_what_the_set_has_no_member_near() -> None:
    def score(lam: float) -> float:
        return (lam - 0.1755) ** 2

    continuous, _ = searched(score, LAMBDAS, "continuous")
    of_set, _ = searched(score, LAMBDAS, "set")
    assert continuous.step.selected == pytest.approx(0.1755, abs=0.01)
    assert abs(of_set.step.selected - 0.1755) > 0.02


def test_what_overflowed_is_selected_only_if_all_did() -> None:
    for finite in (0.04, 0.12):
        found, _ = searched(lambda lam, finite=finite: 1e30 if lam == finite else math.inf, LAMBDAS, "continuous")
        assert found.step.selected == finite
    found, _ = searched(lambda _: math.inf, LAMBDAS, "continuous")
    assert found.step.selected == 0.01


def test_an_unknown_search_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--lambda-search: unknown name 'golden', expected one of: set, continuous$"):
        searched(lambda lam: lam, LAMBDAS, "golden")
