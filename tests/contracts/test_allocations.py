"""Does every allocation keep the contract of `neuronal_ray.allocations`? A new file there is picked up here.

The layout is made by hand and the trials are made up: no model runs.
"""

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import pytest
import torch

from neuronal_ray import plugins
from neuronal_ray.allocations import Allocation, Problem, neuronal
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.plan import Plan

NUM_BLOCKS, HIDDEN, INNER, NUM_HEADS = 4, 16, 40, 4
TARGETS = (0.0, 0.1, 0.37, 0.5, 0.7, 0.85, 0.99)
WIDTHS = (HIDDEN, HIDDEN, HIDDEN, INNER)
"""Columns of a block's four groups: query, key and value; output; gate and up; down."""

Measure = Callable[[float], float]


@pytest.fixture(params=plugins.names("allocations"))
def allocation(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("allocations", request.param)


def block_specs(block: int) -> list[LinearSpec]:
    """A LLaMA block with two key heads for its four query heads."""
    attention, output, mlp, down = (Group(block, index) for index in range(4))
    following = Group(block + 1, 0) if block + 1 < NUM_BLOCKS else None
    dim = HIDDEN // NUM_HEADS
    heads = torch.tensor([[0, 1], [2, 3]])  # [key heads, query heads of each]
    fan = (heads[:, None, :] * dim + torch.arange(dim)[None, :, None]).flatten(0, 1)  # [rows, fan]

    def spec(
        path: str, rows: int, reads: Group, consumer: Group | None, sources: torch.Tensor | None = None
    ) -> LinearSpec:
        return LinearSpec(
            linear=Linear(block, path),
            rows=rows,
            columns=WIDTHS[reads.index],
            reads=reads,
            consumer=consumer,
            sources=sources,
        )

    return [
        spec("attention.query", HIDDEN, attention, output),
        spec("attention.key", HIDDEN // 2, attention, output, fan),
        spec("attention.value", HIDDEN // 2, attention, output, fan),
        spec("attention.output", HIDDEN, output, mlp),
        spec("mlp.gate", INNER, mlp, down),
        spec("mlp.up", INNER, mlp, down),
        spec("mlp.down", HIDDEN, down, following),
    ]


LAYOUT = Layout(tuple(spec for block in range(NUM_BLOCKS) for spec in block_specs(block)))


def some_signals(seed: int) -> dict[Group, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {group: torch.randn(WIDTHS[group.index], generator=generator) for group in LAYOUT.groups}


class Trials:
    """Makes trials up and keeps what it was asked; `measure(lam)` is the misalignment."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self.asked: list[tuple[str, list[float], list[Plan]]] = []
        self.given: list[Trial] = []

    def __call__(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        assert len(lambdas) == len(plans)
        self.asked.append((step, list(lambdas), list(plans)))
        trials = [Trial(misalignment=self.measure(lam), signals=some_signals(round(1000 * lam))) for lam in lambdas]
        self.given += trials
        return trials


def problem_of(target: float, measure: Measure = lambda lam: abs(lam - 0.08), mode: str = "paper") -> Problem:
    return Problem(layout=LAYOUT, target=target, mode=mode, tries=Trials(measure))


def trials_of(problem: Problem) -> Trials:
    assert isinstance(problem.tries, Trials)
    return problem.tries


@pytest.mark.parametrize("target", TARGETS)
def test_the_budget_is_exact_in_paper_mode(allocation: ModuleType, target: float) -> None:
    problem = problem_of(target)
    found: Allocation = allocation.allocate(problem)
    budget = round(target * LAYOUT.prunable)
    assert found.plan.total == budget
    for name, plan in found.baselines.items():
        assert plan.total == budget, name
    for step, lambdas, plans in trials_of(problem).asked:
        assert [plan.total for plan in plans] == [budget] * len(plans), (step, lambdas)


@pytest.mark.parametrize("mode", ["paper", "authors"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_plan_fits_the_layout(allocation: ModuleType, target: float, mode: str) -> None:
    problem = problem_of(target, mode=mode)
    found = allocation.allocate(problem)
    for plan in [
        found.plan,
        *found.baselines.values(),
        *(plan for _, _, plans in trials_of(problem).asked for plan in plans),
    ]:
        plan.check(LAYOUT)
        assert all(counts.dtype == torch.int32 for counts in plan.removed.values())


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_equal_problems_get_equal_answers(allocation: ModuleType, mode: str) -> None:
    first, second = (allocation.allocate(problem_of(0.7, mode=mode)) for _ in range(2))
    assert first.plan.digest == second.plan.digest
    assert first.steps == second.steps
    assert {name: plan.digest for name, plan in first.baselines.items()} == {
        name: plan.digest for name, plan in second.baselines.items()
    }


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_the_problem_and_its_trials_are_not_modified(allocation: ModuleType, mode: str) -> None:
    problem = problem_of(0.6, mode=mode)
    before = (problem.layout.specs, problem.target, problem.mode, problem.tries)
    sources = [None if spec.sources is None else spec.sources.clone() for spec in LAYOUT]
    allocation.allocate(problem)
    assert (problem.layout.specs, problem.target, problem.mode, problem.tries) == before
    for spec, kept in zip(LAYOUT, sources, strict=True):
        assert (spec.sources is None) == (kept is None)
        assert kept is None or torch.equal(spec.sources, kept)
    lambdas = [lam for _, asked, _ in trials_of(problem).asked for lam in asked]
    for lam, trial in zip(lambdas, trials_of(problem).given, strict=True):
        for group, signal in some_signals(round(1000 * lam)).items():
            assert torch.equal(trial.signals[group], signal), group


def test_every_step_reports_what_it_tried(allocation: ModuleType) -> None:
    problem = problem_of(0.7, lambda lam: (lam - 0.1) ** 2)
    found = allocation.allocate(problem)
    asked = {step: lambdas for step, lambdas, _ in trials_of(problem).asked}
    for step in found.steps:
        assert list(step.lambdas) == asked[step.name]
        assert list(step.misalignments) == [(lam - 0.1) ** 2 for lam in step.lambdas]
        assert step.selected == min(step.lambdas, key=lambda lam: (lam - 0.1) ** 2)


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_of_equals_the_first_is_selected(allocation: ModuleType, mode: str) -> None:
    for measure in (lambda _: 0.5, lambda _: math.inf):
        found = allocation.allocate(problem_of(0.7, measure, mode=mode))
        assert [step.selected for step in found.steps] == [step.lambdas[0] for step in found.steps], measure(0)


def test_what_overflowed_is_not_selected(allocation: ModuleType) -> None:
    found = allocation.allocate(problem_of(0.7, lambda lam: math.inf if lam != 0.12 else 1e30))
    assert {step.selected for step in found.steps} <= {0.12}


def test_settings_have_defaults_and_unknown_ones_are_refused(allocation: ModuleType) -> None:
    plugins.check_settings(allocation.allocate, {}, owner="allocation")
    with pytest.raises(ValueError, match=r"--set allocation\.nonsense: unknown setting, expected "):
        plugins.check_settings(allocation.allocate, {"nonsense": 1.0}, owner="allocation")


def test_an_allocation_says_what_it_is(allocation: ModuleType) -> None:
    assert allocation.__doc__
    assert allocation.allocate.__doc__


# NeuronAL's own


def test_rows_are_not_adapted_to_activations_that_overflowed() -> None:
    def tries(step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        signals = {group: torch.full((WIDTHS[group.index],), math.nan) for group in LAYOUT.groups}
        return [Trial(misalignment=math.inf, signals=signals) for _ in plans]

    with pytest.raises(ValueError, match="--model: NaN or infinite activations"):
        neuronal.allocate(Problem(layout=LAYOUT, target=0.7, mode="paper", tries=tries))


def test_blocks_rise_and_keep_the_target() -> None:
    found = neuronal.allocate(problem_of(0.6, lambda lam: abs(lam - 0.15)), steps="block")
    rates = []
    for specs in LAYOUT.blocks:
        removed = sum(int(found.plan.removed[spec.linear].sum()) for spec in specs)
        rates.append(removed / sum(spec.size for spec in specs))
    assert rates == pytest.approx([0.45, 0.55, 0.65, 0.75], abs=1e-3)


def test_rows_stay_as_they_are_at_lambda_0() -> None:
    problem = problem_of(0.6, lambda lam: lam)
    found = neuronal.allocate(problem)
    assert found.steps[1].selected == 0.0
    assert found.plan.digest == found.baselines["block"].digest


def test_a_row_whose_reader_shrank_most_keeps_most() -> None:
    found = neuronal.allocate(problem_of(0.6, lambda lam: -lam), steps="row", row_lambdas=(0.0, 0.2))
    spec = LAYOUT[Linear(1, "mlp.up")]
    shrunk = some_signals(0)[spec.consumer]  # of the trial of the uniform plan, lambda 0
    removed = found.plan.removed[spec.linear]
    assert removed[shrunk.argmax()] == removed.min() < removed.max() == removed[shrunk.argmin()]
