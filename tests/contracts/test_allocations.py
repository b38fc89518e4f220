"""Does every allocation, and every row step after one, keep its contract? A new file is picked up.

The layout is made by hand, weights and inputs are random, trials and losses are made up: no model runs.
"""

import inspect
import math
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import pytest
import torch

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.allocations import neuronal
from neuronal_ray.algorithms.declarations import RowStep
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.lambdas import LAMBDAS, ROW_LAMBDAS
from neuronal_ray.core.layout import Group, Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.pattern import Pattern
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import Allocation, BlockTask, Problem, RankedLinear
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.prune.compose import compose
from neuronal_ray.prune.config import PruneConfig

Result = TypeVar("Result")

NUM_BLOCKS, HIDDEN, INNER, NUM_HEADS = 4, 16, 40, 4
NUM_SAMPLES = 8
TARGETS = (0.0, 0.1, 0.37, 0.5, 0.7, 0.85, 0.99)
WIDTHS = (HIDDEN, HIDDEN, HIDDEN, INNER)
"""Columns of a block's four groups: query, key and value; output; gate and up; down."""

QUICK: dict[str, dict[str, object]] = {
    "adaptive": {"budget": 80, "block_lambdas": (0.01, 0.08), "row_lambdas": (0.0, 0.05)},
    "atp": {"max_candidates": 6},
    "besa": {"steps": 2},
    "neuronal": {"block_lambdas": (0.01, 0.05, 0.08, 0.25), "row_lambdas": (0.0, 0.05, 0.08, 0.12)},
}
"""Settings for all tests here, for allocations that take long."""

Score = Callable[[float], float]
Weights = Mapping[Linear, torch.Tensor]


@pytest.fixture(params=registry.names("allocations"))
def allocation(request: pytest.FixtureRequest) -> str:
    return request.param


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


def text_of(group: Group) -> torch.Tensor:
    """Inputs [2 chunks, sequences, tokens, columns] of a group, a few features much larger than others."""
    generator = torch.Generator().manual_seed(100 * group.block + group.index)
    columns = WIDTHS[group.index]
    return torch.randn(2, 2, 3, columns, generator=generator) * torch.rand(columns, generator=generator).exp().pow(2)


def some_weights() -> dict[Linear, torch.Tensor]:
    """Later blocks have heavier tails."""
    generator = torch.Generator().manual_seed(0)
    return {
        spec.linear: torch.randn(spec.rows, spec.columns, generator=generator).pow(2 * (spec.linear.block // 2) + 1)
        for spec in LAYOUT
    }


@dataclass(frozen=True, eq=False)
class Block:
    """A BlockTask whose output is that of all its linears side by side, each on inputs of its own."""

    specs: Sequence[LinearSpec]
    weights: Weights
    num_texts: int = 2

    @cached_property
    def ranks(self) -> Weights:
        return {linear: rank_rows(weight.abs()) for linear, weight in self.weights.items()}

    def dense_output(self, text: int) -> torch.Tensor:
        return self.output(text, self.weights)

    def output(self, text: int, weights: Weights) -> torch.Tensor:
        return torch.cat([text_of(spec.reads)[text] @ weights[spec.linear].t() for spec in self.specs], dim=-1)


class FakeProbe:
    """Answers from made-up weights and keeps what it was asked; a trial's misalignment and a loss are `score(lam)`."""

    def __init__(self, score: Score, statistic: type[Statistic] | None) -> None:
        self.score, self.statistic = score, statistic
        self.weights = some_weights()
        self.asked: list[tuple[str, list[float], list[Plan]]] = []
        self.given: list[Trial] = []

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        scores = self.losses(step, lambdas, plans)
        trials = [
            Trial(misalignment=score, signals=some_signals(round(1000 * lam)), divergences=(score,) * NUM_SAMPLES)
            for lam, score in zip(lambdas, scores, strict=True)
        ]
        self.given += trials
        return trials

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        return [(score,) * NUM_SAMPLES for score in self.losses(step, lambdas, plans)]

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        """Later linears are worth less: made-up, but a function of the plan."""
        assert 0 <= part.start < part.stop <= NUM_SAMPLES
        return [1 + self._cost({**plan.removed, **change}) for change in changes]

    def _cost(self, removed: Counts) -> float:
        rates = [float(removed[spec.linear].double().mean()) / spec.columns for spec in LAYOUT]
        return sum(rate**2 / (place + 1) for place, rate in enumerate(rates))

    def differences(self, plan: Plan) -> dict[Linear, torch.Tensor]:
        return {linear: weight.double().norm(dim=1) for linear, weight in self.weights.items()}

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        assert len(lambdas) == len(plans) > 0
        self.asked.append((step, list(lambdas), list(plans)))
        return [self.score(lam) for lam in lambdas]

    def measure(self, function: Callable[[Sequence[LinearData]], Result]) -> list[Result]:
        pickle.dumps(function)
        return [function([self._weighed(spec) for spec in specs]) for specs in LAYOUT.blocks]

    def _weighed(self, spec: LinearSpec) -> LinearData:
        inputs = None if self.statistic is None else self.statistic.of(text_of(spec.reads).flatten(0, 1))
        return LinearData(spec=spec, weight=self.weights[spec.linear], inputs=inputs)

    def learn(self, function: Callable[[BlockTask], Result]) -> list[Result]:
        pickle.dumps(function)
        return [
            function(Block(specs, {spec.linear: self.weights[spec.linear] for spec in specs}))
            for specs in LAYOUT.blocks
        ]

    def map_linears(self, function: Callable[[RankedLinear], Result], plan: Plan) -> dict[Linear, Result]:
        pickle.dumps(function)
        return {spec.linear: function(self._ranked(spec, plan)) for spec in LAYOUT}

    def _ranked(self, spec: LinearSpec, plan: Plan) -> RankedLinear:
        weight, inputs = self.weights[spec.linear], text_of(spec.reads).flatten(0, 2)
        return RankedLinear(
            spec=spec,
            weight=weight,
            gram=inputs.t() @ inputs,
            ranks=rank_rows(weight.abs()),
            removed=plan.removed[spec.linear],
        )

    def asked_for(self, step: str) -> tuple[list[float], list[Plan]]:
        """All that was tried under one name, in order."""
        mine = [(lambdas, plans) for name, lambdas, plans in self.asked if name == step]
        return [lam for lambdas, _ in mine for lam in lambdas], [plan for _, plans in mine for plan in plans]

    @property
    def plans(self) -> list[Plan]:
        return [plan for _, _, plans in self.asked for plan in plans]


def near_008(lam: float) -> float:
    return abs(lam - 0.08)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One call of an allocation."""

    problem: Problem
    probe: FakeProbe
    found: Allocation


def allocated(
    allocation: str,
    target: float,
    *,
    score: Score = near_008,
    mode: str = "paper",
    pattern: Pattern | None = None,
    settings: Mapping[str, object] | None = None,
) -> Case:
    """The allocation's answer to a problem of its own; skips what `authors` mode does not have."""
    allocator = registry.load("allocations", allocation)
    if mode == "authors" and not allocator.released:
        pytest.skip("not in the released code")
    probe = FakeProbe(score, allocator.statistic)
    criterion = allocator.criterion or "alignment"
    problem = Problem(layout=LAYOUT, target=target, mode=mode, probe=probe, pattern=pattern, criterion=criterion)
    found = allocator.allocate(problem, **QUICK.get(allocation, {}) | dict(settings or {}))
    return Case(problem=problem, probe=probe, found=found)


@pytest.mark.parametrize("target", TARGETS)
def test_the_budget_is_exact_in_paper_mode(allocation: str, target: float) -> None:
    case = allocated(allocation, target)
    budget = round(target * LAYOUT.prunable)
    assert case.found.plan.total == budget
    for name, plan in case.found.baselines.items():
        assert plan.total == budget, name
    for step, lambdas, plans in case.probe.asked:
        assert [plan.total for plan in plans] == [budget] * len(plans), (step, lambdas)


@pytest.mark.parametrize("mode", ["paper", "authors"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_plan_fits_the_layout(allocation: str, target: float, mode: str) -> None:
    case = allocated(allocation, target, mode=mode)
    for plan in [case.found.plan, *case.found.baselines.values(), *case.probe.plans]:
        plan.check(LAYOUT)
        assert all(counts.dtype == torch.int32 for counts in plan.removed.values())


@pytest.mark.parametrize("mode", ["paper", "authors"])
@pytest.mark.parametrize("target", TARGETS)
def test_rates_are_finite_and_of_every_row(allocation: str, target: float, mode: str) -> None:
    rates = allocated(allocation, target, mode=mode).found.rates
    assert set(rates) == {spec.linear for spec in LAYOUT}
    for spec in LAYOUT:
        assert rates[spec.linear].dtype == torch.float64, spec.linear
        assert rates[spec.linear].shape == (spec.rows,), spec.linear
        assert bool(rates[spec.linear].isfinite().all()), spec.linear


def test_the_plan_is_that_of_the_rates(allocation: str) -> None:
    case = allocated(allocation, 0.7)
    assert case.found.plan.digest == case.problem.plan(case.found.rates, rows_adapted=True).digest


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_equal_problems_get_equal_answers(allocation: str, mode: str) -> None:
    first, second = (allocated(allocation, 0.7, mode=mode).found for _ in range(2))
    assert first.plan.digest == second.plan.digest
    assert first.steps == second.steps
    assert all(torch.equal(rate, second.rates[linear]) for linear, rate in first.rates.items())
    assert {name: plan.digest for name, plan in first.baselines.items()} == {
        name: plan.digest for name, plan in second.baselines.items()
    }


@pytest.mark.parametrize("mode", ["paper", "authors"])
def test_the_model_and_its_trials_are_not_modified(allocation: str, mode: str) -> None:
    sources = [None if spec.sources is None else spec.sources.clone() for spec in LAYOUT]
    case = allocated(allocation, 0.6, mode=mode)
    criterion = case.problem.criterion
    assert case.problem == Problem(layout=LAYOUT, target=0.6, mode=mode, probe=case.probe, criterion=criterion)
    for spec, kept in zip(LAYOUT, sources, strict=True):
        assert (spec.sources is None) == (kept is None)
        assert kept is None or torch.equal(spec.sources, kept)
    for linear, weight in some_weights().items():
        assert torch.equal(case.probe.weights[linear], weight), linear
        assert not case.probe.weights[linear].requires_grad, linear
    lambdas = [lam for _, asked, _ in case.probe.asked for lam in asked][: len(case.probe.given)]
    for lam, trial in zip(lambdas, case.probe.given, strict=True):
        for group, signal in some_signals(round(1000 * lam)).items():
            assert torch.equal(trial.signals[group], signal), group


@pytest.mark.parametrize("mode", ["paper", "authors"])
@pytest.mark.parametrize(
    "score",
    [
        near_008,
        lambda _: 0.5,
        lambda _: math.inf,
        lambda lam: math.inf if lam < 0.05 else 1e30,
        lambda lam: math.inf if lam > 0.05 else 1e30,
        lambda lam: -lam,
    ],
    ids=["valley", "equals", "all overflow", "low overflow", "high overflow", "falling"],
)
def test_a_step_selects_the_first_of_the_least_it_tried(allocation: str, score: Score, mode: str) -> None:
    case = allocated(allocation, 0.7, score=score, mode=mode)
    for step in case.found.steps:
        lambdas, plans = case.probe.asked_for(step.name)
        assert list(step.lambdas) == lambdas
        assert list(step.scores) == pytest.approx([score(lam) for lam in lambdas], rel=1e-12)
        assert step.selected == min(lambdas, key=score)  # min keeps the first of equals
    if case.found.steps:
        selected = plans[lambdas.index(case.found.steps[-1].selected)]
        assert case.found.plan.digest == selected.digest


@pytest.mark.parametrize("target", TARGETS)
def test_under_a_pattern_a_linear_has_one_count_and_the_budget_is_met_nearly(allocation: str, target: float) -> None:
    case = allocated(allocation, target, pattern=Pattern(None, 8))
    smallest = min(spec.size for spec in LAYOUT) // 8
    for plan in [case.found.plan, *case.found.baselines.values(), *case.probe.plans]:
        plan.check(LAYOUT)
        assert abs(plan.total - round(target * LAYOUT.prunable)) <= smallest / 2
        for spec in LAYOUT:
            counts = plan.removed[spec.linear]
            assert bool((counts == counts[0]).all()), spec.linear
            assert int(counts[0]) % (spec.columns // 8) == 0, spec.linear


def test_authors_mode_is_kept_or_refused_in_one_line(allocation: str) -> None:
    config = PruneConfig(model="m", mode="authors", allocation=allocation)
    if registry.load("allocations", allocation).released:
        compose(config)
        allocated(allocation, 0.7, mode="authors")
        return
    with pytest.raises(BadInput, match=f"^--allocation: {allocation} is not in the released code; use --mode paper$"):
        compose(config)


def test_settings_have_defaults_and_unknown_ones_are_refused(allocation: str) -> None:
    allocate = registry.load("allocations", allocation).allocate
    _, *settings = inspect.signature(allocate).parameters.values()
    for setting in settings:
        assert setting.kind is setting.KEYWORD_ONLY, setting.name
        assert setting.default is not setting.empty, setting.name
    registry.check_settings([allocate], {}, owner="allocation")
    with pytest.raises(ValueError, match=r"--set allocation\.nonsense: unknown setting, expected "):
        registry.check_settings([allocate], {"nonsense": 1.0}, owner="allocation")


def test_what_an_allocation_checks_and_counts_has_the_defaults_of_what_it_does(allocation: str) -> None:
    allocator = registry.load("allocations", allocation)
    settings = registry.arguments_of(allocator.allocate)
    for function in (allocator.check, allocator.candidates):
        for name, argument in ({} if function is None else registry.arguments_of(function)).items():
            assert argument.default == settings[name].default, name
    assert allocator.options.keys() <= settings.keys()


def test_an_allocation_counts_its_candidates_before_it_tries_them(allocation: str) -> None:
    allocator = registry.load("allocations", allocation)
    if allocator.candidates is None:
        return
    case = allocated(allocation, 0.7)
    settings = registry.settings_for(allocator.candidates, QUICK[allocation])
    counts = allocator.candidates(case.problem, **settings)
    assert set(counts) == {step.name for step in case.found.steps}
    assert all(len(step.lambdas) <= counts[step.name] for step in case.found.steps)


def test_an_allocation_says_what_it_is_and_what_it_reads(allocation: str) -> None:
    allocator = registry.load("allocations", allocation)
    assert sys.modules[allocator.allocate.__module__].__doc__
    assert allocator.allocate.__doc__
    assert allocator.statistic is None or issubclass(allocator.statistic, SquareSum)


# Row steps


@pytest.fixture(params=registry.names("rows"))
def row_step(request: pytest.FixtureRequest) -> RowStep:
    return registry.load("rows", request.param)


def with_rows(row_step: RowStep, target: float) -> Case:
    """The row step after an allocation whose blocks differ."""
    before = allocated("owl", target)
    settings = registry.settings_for(row_step.spread_rows, QUICK["neuronal"])
    found = row_step.spread_rows(before.problem, before.found, **settings)
    assert found.baselines["before rows"].digest == before.found.plan.digest
    assert found.baselines.keys() - {"before rows"} == before.found.baselines.keys()
    assert found.steps[: len(before.found.steps)] == before.found.steps
    return Case(problem=before.problem, probe=before.probe, found=found)


@pytest.mark.parametrize("target", TARGETS)
def test_a_row_step_keeps_the_budget_and_fits_the_layout(row_step: RowStep, target: float) -> None:
    found = with_rows(row_step, target).found
    found.plan.check(LAYOUT)
    assert found.plan.total == round(target * LAYOUT.prunable)
    for spec in LAYOUT:
        assert found.rates[spec.linear].dtype == torch.float64, spec.linear
        assert found.rates[spec.linear].shape == (spec.rows,), spec.linear
        assert bool(found.rates[spec.linear].isfinite().all()), spec.linear


def test_a_row_step_makes_rows_differ_and_repeats_itself(row_step: RowStep) -> None:
    first, second = (with_rows(row_step, 0.6) for _ in range(2))
    assert first.found.plan.digest == second.found.plan.digest
    assert first.found.plan.digest == first.problem.plan(first.found.rates, rows_adapted=True).digest
    assert any(int(counts.max() - counts.min()) > 1 for counts in first.found.plan.removed.values())
    for linear, weight in some_weights().items():
        assert torch.equal(first.probe.weights[linear], weight), linear


def test_a_row_step_says_what_it_does_and_counts_its_candidates(row_step: RowStep) -> None:
    assert sys.modules[row_step.spread_rows.__module__].__doc__
    assert row_step.spread_rows.__doc__
    settings = registry.arguments_of(row_step.spread_rows)
    for function in (row_step.check, row_step.candidates):
        for name, argument in ({} if function is None else registry.arguments_of(function)).items():
            assert argument.default == settings[name].default, name
    case = with_rows(row_step, 0.6)
    if row_step.candidates is not None:
        given = registry.settings_for(row_step.candidates, QUICK["neuronal"])
        assert row_step.candidates(case.problem, **given) == {step.name: len(step.lambdas) for step in case.found.steps}


# NeuronAL's own


def test_rows_are_not_adapted_to_activations_that_overflowed() -> None:
    class Overflowing(FakeProbe):
        def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
            signals = {group: torch.full((WIDTHS[group.index],), math.nan) for group in LAYOUT.groups}
            trials = super().tries(step, lambdas, plans)
            return [Trial(misalignment=trial.misalignment, signals=signals) for trial in trials]

    probe = Overflowing(lambda _: math.inf, None)
    with pytest.raises(ValueError, match="--model: NaN or infinite activations"):
        neuronal.allocate(Problem(layout=LAYOUT, target=0.7, mode="paper", probe=probe))


def test_blocks_rise_and_keep_the_target() -> None:
    case = allocated(
        "neuronal", 0.6, score=lambda lam: abs(lam - 0.15), settings={"steps": "block", "block_lambdas": (0.1, 0.15)}
    )
    rates = []
    for specs in LAYOUT.blocks:
        removed = sum(int(case.found.plan.removed[spec.linear].sum()) for spec in specs)
        rates.append(removed / sum(spec.size for spec in specs))
    assert rates == pytest.approx([0.45, 0.55, 0.65, 0.75], abs=1e-3)


def test_rows_stay_as_they_are_at_lambda_0() -> None:
    found = allocated("neuronal", 0.6, score=lambda lam: lam).found
    assert found.steps[1].selected == 0.0
    assert found.plan.digest == found.baselines["block"].digest


def test_a_row_whose_reader_shrank_most_keeps_most() -> None:
    settings = {"steps": "row", "row_lambdas": (0.0, 0.2)}
    found = allocated("neuronal", 0.6, score=lambda lam: -lam, settings=settings).found
    spec = LAYOUT[Linear(1, "mlp.up")]
    shrunk = some_signals(1000)[spec.consumer]  # of the trial of the uniform plan, candidate 1
    removed = found.plan.removed[spec.linear]
    assert removed[shrunk.argmax()] == removed.min() < removed.max() == removed[shrunk.argmin()]


@pytest.mark.parametrize("schedule", ["exp", "log"])
def test_blocks_rise_by_the_schedule_asked_for(schedule: str) -> None:
    found = allocated("neuronal", 0.6, settings={"steps": "block", "schedule": schedule}).found
    levels = {"log": [math.log(block + 1) / math.log(4) for block in range(4)]}
    levels["exp"] = [(4 ** (block / 3) - 1) / 3 for block in range(4)]
    expected = [0.6 + 0.16 * (level - sum(levels[schedule]) / 4) for level in levels[schedule]]
    assert found.steps[0].selected == 0.08
    assert [float(found.rates[Linear(block, "mlp.up")][0]) for block in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "flag"), [({"schedule": "exp"}, "--schedule"), ({"lambda_search": "continuous"}, "--lambda-search")]
)
def test_what_the_released_code_does_not_have_is_refused(settings: dict[str, object], flag: str) -> None:
    probe = FakeProbe(near_008, None)
    problem = Problem(layout=LAYOUT, target=0.6, mode="authors", probe=probe)
    with pytest.raises(ValueError, match=f"^{flag}: .* is not in the released code; use --mode paper$"):
        neuronal.allocate(problem, **settings)
    assert not probe.asked


def test_a_set_that_the_released_code_leaves_out_is_refused() -> None:
    problem = Problem(layout=LAYOUT, target=0.8, mode="authors", probe=FakeProbe(near_008, None))
    with pytest.raises(ValueError, match=r"^--block-lambdas: the released code leaves 0\.25 out from 0\.8 on$"):
        neuronal.allocate(problem, block_lambdas=(0.25,))


def test_both_steps_of_a_continuous_search_spend_no_more_trials_than_their_sets() -> None:
    sets = {"block_lambdas": LAMBDAS, "row_lambdas": ROW_LAMBDAS}
    case = allocated("neuronal", 0.6, settings={"lambda_search": "continuous"} | sets)
    block, row = case.found.steps
    assert len(block.lambdas) == 14
    assert len(row.lambdas) == 15
    assert block.selected == pytest.approx(0.08, abs=0.01)
    assert row.selected == pytest.approx(0.08, abs=0.01)


def test_under_a_pattern_only_blocks_are_searched() -> None:
    case = allocated("neuronal", 0.6, pattern=Pattern(None, 8))
    assert [step.name for step in case.found.steps] == ["block"]
    assert {name for name, _, _ in case.probe.asked} == {"block"}
