"""Does ATP try its published slopes, and choose by the calibration loss alone?"""

import logging
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.algorithms.allocations import atp
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.problem import Problem


def layout_of(num_blocks: int, *, rows: int = 6, columns: int = 50) -> Layout:
    """Two linears per block, of unequal size."""
    return Layout(
        tuple(
            LinearSpec(
                linear=Linear(block, path),
                rows=rows * (1 + index),
                columns=columns,
                reads=Group(block, index),
                consumer=None,
                sources=None,
            )
            for block in range(num_blocks)
            for index, path in enumerate(("up", "down"))
        )
    )


class Losses:
    """A probe whose loss is a function of lambda and plan."""

    def __init__(self, loss: Callable[[float, Plan], float]) -> None:
        self.loss = loss
        self.asked: list[tuple[str, list[float], list[Plan]]] = []

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        self.asked.append((step, list(lambdas), list(plans)))
        return [self.loss(lam, plan) for lam, plan in zip(lambdas, plans, strict=True)]


def problem_of(
    num_blocks: int, target: float, loss: Callable[[float, Plan], float] = lambda lam, _: lam, mode: str = "paper"
) -> Problem:
    return Problem(layout=layout_of(num_blocks), target=target, mode=mode, probe=Losses(loss))


def literal_slopes(num_blocks: int, target: str, step: str) -> list[float]:
    """The published loop, in exact arithmetic: every multiple of the step that keeps all blocks in [0, 1]."""
    beta, found = Fraction(step), []
    while True:
        rates = [Fraction(target) - beta * (num_blocks - 1) / 2 + beta * block for block in range(num_blocks)]
        if min(rates) < 0 or max(rates) > 1:
            return found
        found.append(float(beta))
        beta += Fraction(step)


@pytest.mark.parametrize("num_blocks", [2, 4, 6, 13, 32, 80])
@pytest.mark.parametrize("target", ["0.1", "0.3", "0.5", "0.7", "0.8", "0.85"])
@pytest.mark.parametrize("step", ["0.002", "0.01"])
def test_the_slopes_are_the_published_grid(num_blocks: int, target: str, step: str) -> None:
    wanted = literal_slopes(num_blocks, target, step)
    assert atp.slopes(num_blocks, target=float(target), step=float(step), most=10**6) == pytest.approx(wanted, abs=1e-9)


@given(num_blocks=st.integers(2, 40), target=st.floats(0, 1), step=st.floats(1e-3, 0.5), most=st.integers(1, 40))
def test_a_thinned_grid_is_even_and_reaches_the_widest(num_blocks: int, target: float, step: float, most: int) -> None:
    every = atp.slopes(num_blocks, target=target, step=step, most=10**6)
    thinned = atp.slopes(num_blocks, target=target, step=step, most=most)
    assert len(thinned) == min(most, len(every))
    assert set(thinned) <= set(every)
    assert thinned == sorted(set(thinned))
    assert thinned[-1:] == every[-1:]
    gaps = [round((later - sooner) / step) for sooner, later in zip([0.0, *thinned], thinned, strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1, gaps


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("num_blocks", [2, 5, 6])
def test_rates_are_the_progression(num_blocks: int, target: float) -> None:
    beta = 0.004
    rates = atp.block_rates(problem_of(num_blocks, target), beta)
    for linear, rate in rates.items():
        wanted = target - beta * (num_blocks - 1) / 2 + beta * linear.block
        assert rate.tolist() == pytest.approx([wanted] * len(rate), abs=1e-12), linear


@pytest.mark.parametrize("target", [0.1, 0.37, 0.5, 0.7, 0.85])
@pytest.mark.parametrize("num_blocks", [2, 5, 9])
def test_every_plan_keeps_the_budget_and_fits(num_blocks: int, target: float) -> None:
    problem = problem_of(num_blocks, target)
    found = atp.allocate(problem)
    budget = round(target * problem.layout.prunable)
    ((_, _, plans),) = problem.probe.asked
    for plan in [found.plan, found.baselines["uniform"], *plans]:
        plan.check(problem.layout)
        assert plan.total == budget


def test_the_slope_of_least_loss_is_selected_and_recorded() -> None:
    problem = problem_of(6, 0.7, lambda lam, _: (lam - 0.05) ** 2)
    found = atp.allocate(problem, max_candidates=1000)
    ((name, betas, plans),) = problem.probe.asked
    (step,) = found.steps
    assert (step.name, list(step.lambdas)) == (name, betas) == ("slope", betas)
    assert betas[0] == 0.002
    assert betas[-1] == 0.12
    assert len(betas) == 60
    assert list(step.scores) == [(beta - 0.05) ** 2 for beta in betas]
    assert step.selected == 0.05
    assert found.plan.digest == plans[betas.index(0.05)].digest
    assert found.plan.digest == problem.plan(found.rates, rows_adapted=False).digest


def test_a_planted_slope_is_found_by_its_plan() -> None:
    hidden = problem_of(4, 0.6).plan(atp.block_rates(problem_of(4, 0.6), 0.08), rows_adapted=False)

    def distance(_: float, plan: Plan) -> float:
        return float(sum((plan.removed[linear] - hidden.removed[linear]).abs().sum() for linear in hidden.removed))

    found = atp.allocate(problem_of(4, 0.6, distance), step=0.01)
    assert found.steps[0].selected == pytest.approx(0.08)
    assert found.plan.digest == hidden.digest


def test_of_equal_losses_the_first_slope_is_selected() -> None:
    for loss in (1.0, math.nan, math.inf):
        found = atp.allocate(problem_of(6, 0.7, lambda *_, loss=loss: loss))
        assert found.steps[0].selected == found.steps[0].lambdas[0], loss


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_wins(broken: float) -> None:
    found = atp.allocate(problem_of(6, 0.7, lambda lam, _: 1e30 if lam == 0.12 else broken))
    assert found.steps[0].selected == 0.12


@pytest.mark.parametrize(("num_blocks", "target"), [(1, 0.7), (6, 0.0), (6, 1.0), (32, 0.99)])
def test_where_no_slope_fits_the_plan_is_uniform(
    num_blocks: int, target: float, caplog: pytest.LogCaptureFixture
) -> None:
    problem = problem_of(num_blocks, target)
    with caplog.at_level(logging.WARNING):
        found = atp.allocate(problem)
    assert found.plan.digest == found.baselines["uniform"].digest
    assert found.plan.total == round(target * problem.layout.prunable)
    assert found.steps == ()
    assert problem.probe.asked == []
    assert "no slope" in caplog.text


def test_bad_settings_are_refused() -> None:
    for step in (0.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"^--set allocation\.step: "):
            atp.allocate(problem_of(4, 0.5), step=step)
    with pytest.raises(ValueError, match=r"^--set allocation\.max_candidates: 0"):
        atp.allocate(problem_of(4, 0.5), max_candidates=0)
