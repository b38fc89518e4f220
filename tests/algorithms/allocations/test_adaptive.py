"""Does the search keep its budget and its promises, and does it find what a made-up model would have it find?"""

from collections.abc import Callable, Sequence

import pytest
import torch

from neuronal_ray.algorithms.allocations import adaptive
from neuronal_ray.algorithms.allocations.adaptive import joint_rates
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group, Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import Allocation, Problem
from neuronal_ray.core.stats import SquareSum

NUM_BLOCKS, SAMPLES, TARGET = 4, 8, 0.7
KINDS = (("attention.qkv", "attention"), ("attention.out", "attention"), ("mlp.up", "mlp"), ("mlp.down", "mlp"))


def spec_of(block: int, index: int) -> LinearSpec:
    path, part = KINDS[index]
    following = Group(block, index + 1) if index < 3 else None
    return LinearSpec(
        linear=Linear(block, path),
        rows=10,
        columns=50,
        reads=Group(block, index),
        consumer=None if following is None else Group(block, index + 1),
        sources=torch.zeros(10, 1, dtype=torch.long),
        sub_block=part,
    )


LAYOUT = Layout(tuple(spec_of(block, index) for block in range(NUM_BLOCKS) for index in range(4)))
WEIGHTS = [1.0, 20.0, 0.2, 5.0] * NUM_BLOCKS
"""How much each linear's loss counts: kinds differ by a factor of a hundred."""


class MadeUp:
    """A model whose divergence is a sum over linears of weight * rate^4, a little more on later sequences."""

    def __init__(self, *, noise: float = 0.0, overflow: bool = False) -> None:
        self.noise, self.overflow = noise, overflow
        self.spent = 0.0
        self.rounds = 0
        self.seen: list[Plan] = []

    def value(self, removed: Counts) -> float:
        if self.overflow:
            return float("inf")
        rates = [int(removed[spec.linear].sum()) / spec.size for spec in LAYOUT]
        return sum(weight * rate**4 for weight, rate in zip(WEIGHTS, rates, strict=True))

    def each(self, plan: Plan) -> tuple[float, ...]:
        generator = torch.Generator().manual_seed(int.from_bytes(plan.digest[:4], "big"))
        noise = self.noise * torch.randn(SAMPLES, generator=generator)
        return tuple(self.value(plan.removed) * (1 + 0.01 * index + float(noise[index])) for index in range(SAMPLES))

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        assert len(lambdas) == len(plans) > 0
        self.spent += len(plans)
        self.rounds += 1
        self.seen += plans
        return [self.each(plan) for plan in plans]

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        signals = {spec.reads: torch.arange(50.0) for spec in LAYOUT}
        found = self.divergences(step, lambdas, plans)
        return [
            Trial(misalignment=abs(lam - 4), signals=signals, divergences=each)
            for lam, each in zip(lambdas, found, strict=True)
        ]

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        firsts = [min((linear.block for linear in change), default=NUM_BLOCKS) for change in changes]
        self.spent += len(part) / SAMPLES * (sum(NUM_BLOCKS - first for first in firsts) + max(firsts)) / NUM_BLOCKS
        self.rounds += 1
        return [self.value({**plan.removed, **change}) for change in changes]

    def differences(self, plan: Plan) -> dict[Linear, torch.Tensor]:
        self.spent += 2
        self.rounds += 1
        return {spec.linear: torch.arange(10, dtype=torch.float64) for spec in LAYOUT}

    def measure(self, function: Callable[[Sequence[LinearData]], object]) -> list[object]:
        generator = torch.Generator().manual_seed(0)
        inputs = SquareSum.of(torch.ones(1, 3, 50))
        return [
            function(
                [
                    LinearData(spec=spec, weight=torch.randn(10, 50, generator=generator), inputs=inputs)
                    for spec in block
                ]
            )
            for block in LAYOUT.blocks
        ]


def found(probe: MadeUp, *, target: float = TARGET, **settings: object) -> Allocation:
    problem = Problem(layout=LAYOUT, target=target, mode="best", probe=probe, criterion="kl", samples=SAMPLES)
    return adaptive.allocate(problem, **settings)


def optimum() -> float:
    """The least value at the target: w * r^3 equal for all linears that are not empty, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(200):
        level = (low + high) / 2
        rates = [min(1.0, (level / weight) ** (1 / 3)) for weight in WEIGHTS]
        low, high = (level, high) if sum(rates) / len(rates) < TARGET else (low, level)
    return sum(weight * rate**4 for weight, rate in zip(WEIGHTS, rates, strict=True))


def test_most_of_what_can_be_gained_is() -> None:
    probe = MadeUp()
    result = found(probe, rows=False)
    uniform, best, least = (
        probe.value(result.baselines["uniform"].removed),
        probe.value(result.plan.removed),
        optimum(),
    )
    assert least <= best < least + 0.1 * (uniform - least)


@pytest.mark.parametrize("budget", [1, 2, 5, 13, *range(17, 60, 3), 70, 100, 140, 300])
def test_any_budget_is_kept_and_has_an_answer(budget: int) -> None:
    probe = MadeUp()
    result = found(probe, budget=budget)
    assert probe.spent <= budget
    assert result.plan.total == round(TARGET * LAYOUT.prunable)
    assert probe.value(result.plan.removed) <= probe.value(result.baselines["uniform"].removed)
    (step,) = result.steps
    assert len(step.scores) == len(step.lambdas) == len(probe.seen)
    assert step.lambdas == tuple(range(1, 1 + len(probe.seen))), "candidates are numbered from 1"
    assert probe.seen[int(step.selected) - 1].digest == result.plan.digest


@pytest.mark.parametrize("budget", [2, 5, 20, 45, 90, 140])
@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_no_plan_that_was_tried_is_better_on_both_halves(budget: int, noise: float) -> None:
    probe = MadeUp(noise=noise)
    chosen = probe.each(found(probe, budget=budget).plan)
    halves = (slice(0, None, 2), slice(1, None, 2))
    for number, plan in enumerate(probe.seen, start=1):
        tried = probe.each(plan)
        gains = [sum(chosen[half]) - sum(tried[half]) for half in halves]
        assert min(gains) <= 0, f"candidate {number} of {len(probe.seen)} is better by {gains}"


@pytest.mark.parametrize(
    ("budget", "steps"), [(41, set()), (42, {"block"}), (86, {"block"}), (87, {"block", "neuronal"})]
)
def test_neuronal_s_candidates_are_tried_where_they_take_a_third_of_the_budget(budget: int, steps: set[str]) -> None:
    assert set(found(MadeUp(), budget=budget).baselines) == {"uniform"} | steps


def test_the_default_takes_twelve_rounds() -> None:
    for rows in (True, False):
        probe = MadeUp()
        found(probe, rows=rows)
        assert probe.rounds <= 12


@pytest.mark.parametrize("seed_target", [0.5, 0.7, 0.9])
def test_uniform_and_neuronal_s_winners_are_candidates(seed_target: float) -> None:
    probe = MadeUp(noise=0.3)
    result = found(probe, target=seed_target)
    assert set(result.baselines) == {"uniform", "block", "neuronal"}
    digests = {plan.digest for plan in probe.seen}
    assert all(plan.digest in digests for plan in result.baselines.values())
    assert probe.seen[0].digest == result.baselines["uniform"].digest
    assert probe.seen[3].digest != result.baselines["uniform"].digest


def test_what_helps_one_half_of_the_text_only_is_not_taken() -> None:
    class Torn(MadeUp):
        """Everything but the first plan is better on even sequences, worse on odd ones, better in the mean."""

        def each(self, plan: Plan) -> tuple[float, ...]:
            first = not self.seen or plan.digest == self.seen[0].digest
            return (1.0,) * SAMPLES if first else (0.1, 1.01) * (SAMPLES // 2)

    result = found(Torn())
    assert result.plan.digest == result.baselines["uniform"].digest


def test_a_model_that_overflows_everywhere_is_pruned_uniformly() -> None:
    result = found(MadeUp(overflow=True))
    assert result.plan.digest == result.baselines["uniform"].digest


def test_nothing_to_remove() -> None:
    assert found(MadeUp(), target=0.0).plan.total == 0


@pytest.mark.parametrize(
    "settings", [{"blocks": False}, {"parts": False}, {"rows": False}, {"starts": ""}, {"iterations": 0}]
)
def test_every_step_can_be_left_out(settings: dict[str, object]) -> None:
    probe = MadeUp()
    result = found(probe, **settings)
    assert result.plan.total == round(TARGET * LAYOUT.prunable)
    means = torch.tensor([float(result.rates[spec.linear].mean()) for spec in LAYOUT]).view(NUM_BLOCKS, 4)
    start = {plan.digest for plan in probe.seen[: 1 + 2 + 14 + 15]}
    if result.plan.digest in start:
        return
    if settings.get("blocks") is False:
        assert torch.allclose(means, means[:1].expand_as(means), atol=0.01), "all blocks are alike"
    if settings.get("parts") is False:
        assert torch.allclose(means, means[:, :1].expand_as(means), atol=0.01), "all linears of a block are alike"
    if settings.get("rows") is False:
        assert all(int(counts.max() - counts.min()) <= 1 for counts in result.plan.removed.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "--search-budget: 0 is not positive"),
        ({"starts": "owl,besa"}, "--set allocation.starts: 'besa', expected some of: neuronal, owl"),
        ({"iterations": -1}, "--set allocation.iterations: -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        found(MadeUp(), **settings)


def test_joint_rates_are_those_of_one_threshold_for_the_linear() -> None:
    spec = spec_of(0, 0)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 50, generator=generator) * torch.arange(1, 11)[:, None]
    inputs = SquareSum.of(torch.rand(1, 6, 50, generator=generator))
    removed = 320
    (rates,) = joint_rates(
        [LinearData(spec=spec, weight=weight, inputs=inputs)], removed={spec.linear: removed}
    ).values()
    scores = sorted(
        (abs(float(weight[row, column])) * float(inputs.norm[column]), row) for row in range(10) for column in range(50)
    )
    lost = [0] * 10
    for _, row in scores[:removed]:
        lost[row] += 1
    assert (rates * 50).round().int().tolist() == lost
