"""Is DSA the published function of the scores, and does its search only ever improve on it?"""

import logging
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from neuronal_ray.algorithms.allocations import dsa
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec, Weighed
from neuronal_ray.core.operators import PAIRS, TRANSFORMS, Expression
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.problem import Allocation, Problem
from neuronal_ray.core.stats import SquareSum

NUM_BLOCKS = 6
SHAPES = (("query", 8, 12), ("up", 20, 12), ("down", 12, 20))


def layout_of(num_blocks: int) -> Layout:
    return Layout(
        tuple(
            LinearSpec(
                linear=Linear(block, path),
                rows=rows,
                columns=columns,
                reads=Group(block, index),
                consumer=None,
                sources=None,
            )
            for block in range(num_blocks)
            for index, (path, rows, columns) in enumerate(SHAPES)
        )
    )


def some_blocks(layout: Layout, seed: int, *, spread: float = 0.4) -> list[list[Weighed]]:
    """Weights whose logarithms vary more from block to block; one weight in 60 is exactly 0."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for specs in layout.blocks:
        width = spread * float(1 + 2 * torch.rand(1, generator=generator))
        linears = []
        for spec in specs:
            shape = (spec.rows, spec.columns)
            weight = (width * torch.randn(shape, generator=generator)).exp() * torch.randn(
                shape, generator=generator
            ).sign()
            weight[torch.rand(shape, generator=generator) < 1 / 60] = 0.0
            inputs = SquareSum.of(1 + torch.rand(2, 5, spec.columns, generator=generator))
            linears.append(Weighed(spec=spec, weight=weight, inputs=inputs))
        blocks.append(linears)
    return blocks


class FakeProbe:
    """Holds the blocks; the loss of a plan is what `loss` says."""

    def __init__(self, blocks: list[list[Weighed]], loss: Callable[[Plan], float]) -> None:
        self.blocks, self.loss = blocks, loss
        self.measured = 0
        self.asked: list[tuple[str, list[float], list[Plan]]] = []

    def measure(self, function: Callable[[Sequence[Weighed]], Any]) -> list[Any]:
        self.measured += 1
        function = pickle.loads(pickle.dumps(function))  # as the pool does
        return [function(linears) for linears in self.blocks]

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        self.asked.append((step, list(lambdas), list(plans)))
        return [self.loss(plan) for plan in plans]


def problem_of(
    *,
    target: float = 0.6,
    seed: int = 0,
    spread: float = 0.4,
    num_blocks: int = NUM_BLOCKS,
    mode: str = "paper",
    loss: Callable[[Plan], float] = lambda _: 1.0,
) -> Problem:
    layout = layout_of(num_blocks)
    probe = FakeProbe(some_blocks(layout, seed, spread=spread), loss)
    return Problem(layout=layout, target=target, mode=mode, probe=probe)


def distance_to(hidden: Plan) -> Callable[[Plan], float]:
    def distance(plan: Plan) -> float:
        return 1.0 + float(
            sum((plan.removed[linear] - hidden.removed[linear]).abs().sum() for linear in hidden.removed)
        )

    return distance


def literal_importance(linears: Sequence[Weighed]) -> float:
    """asin(atan(variance of ln(|W| a))) of a block's linears one after the other, 0 where there is none."""
    logs = []
    for linear in linears:
        norms = linear.inputs.norm.tolist()
        for row in linear.weight.tolist():
            for weight, norm in zip(row, norms, strict=True):
                score = abs(weight) * norm
                logs.append(math.log(score) if score != 0 else 0.0)
    mean = sum(logs) / len(logs)
    variance = sum((log - mean) ** 2 for log in logs) / (len(logs) - 1)
    bent = math.atan(variance)
    return math.asin(bent) if bent <= 1 else 0.0


def literal_rates(problem: Problem, lam: float) -> list[float]:
    """The released code's arithmetic: min-max, inverted, OWL's densities."""
    importance = np.array([literal_importance(linears) for linears in problem.probe.blocks])
    ratio = (importance - importance.min()) / (importance.max() - importance.min())
    ratio = np.array([1 - item for item in ratio])
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * lam * 2)
    ratio = ratio - np.mean(ratio) + (1 - problem.target)
    return [1 - item for item in ratio]


def rates_by_block(found: Allocation) -> list[float]:
    by_block: dict[int, set[float]] = {}
    for linear, rates in found.rates.items():
        by_block.setdefault(linear.block, set()).update(rates.tolist())
    assert all(len(rates) == 1 for rates in by_block.values()), by_block
    return [by_block[block].pop() for block in sorted(by_block)]


@pytest.mark.parametrize("seed", [0, 1, 5, 7])
@pytest.mark.parametrize("lam", [0.08, 0.2])
@pytest.mark.parametrize("spread", [0.4, 0.5])  # within the domain of asin, and beyond it in some blocks
def test_the_default_is_the_published_function(seed: int, lam: float, spread: float) -> None:
    problem = problem_of(seed=seed, spread=spread)
    found = dsa.allocate(problem, lam=lam)
    assert rates_by_block(found) == pytest.approx(literal_rates(problem, lam), abs=1e-5)
    assert found.plan.digest == problem.plan(found.rates, rows_adapted=False).digest
    assert problem.probe.measured == 1
    assert problem.probe.asked == []
    assert found.steps == ()


@pytest.mark.parametrize("seed", [0, 1, 5, 7])
def test_the_cases_are_within_and_beyond_the_domain_of_asin(seed: int) -> None:
    within = [literal_importance(linears) for linears in problem_of(seed=seed, spread=0.4).probe.blocks]
    beyond = [literal_importance(linears) for linears in problem_of(seed=seed, spread=0.5).probe.blocks]
    assert 0.0 not in within, within
    assert 0.0 in beyond, beyond
    assert max(beyond) > 0.0, beyond


def test_blocks_without_a_value_are_the_densest_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    problem = problem_of(seed=1, spread=0.5)
    with caplog.at_level(logging.WARNING):
        rates = rates_by_block(dsa.allocate(problem))
    beyond = [block for block, linears in enumerate(problem.probe.blocks) if literal_importance(linears) == 0.0]
    assert f"no value in blocks {beyond}" in caplog.text
    assert all(rates[block] == min(rates) for block in beyond), (beyond, rates)


@pytest.mark.parametrize("target", [0.0, 0.1, 0.5, 0.7, 0.85, 0.99])
def test_every_plan_keeps_the_budget_and_fits(target: float) -> None:
    problem = problem_of(target=target)
    budget = round(target * problem.layout.prunable)
    found = dsa.allocate(problem, lam=0.15, search=2, population=4)
    tried = [plan for _, _, plans in problem.probe.asked for plan in plans]
    for plan in [found.plan, *found.baselines.values(), *tried]:
        plan.check(problem.layout)
        assert plan.total == budget


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_reductions_of_a_block_are_those_of_its_scores_together(pair: tuple[str, str]) -> None:
    (linears,) = problem_of(num_blocks=1, spread=0.2).probe.blocks
    together = torch.cat([(each.weight.abs() * each.inputs.norm).flatten() for each in linears])[None, :]
    whole = Weighed(
        spec=LinearSpec(
            linear=Linear(0, "all"), rows=1, columns=together.shape[1], reads=Group(0, 0), consumer=None, sources=None
        ),
        weight=together,
        inputs=SquareSum.of(torch.ones(1, 1, together.shape[1])),
    )
    found, wanted = dsa.reductions(linears, pairs=[pair])[pair], dsa.reductions([whole], pairs=PAIRS)[pair]
    assert found == pytest.approx(wanted, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_in_float32(dtype: torch.dtype) -> None:
    (linears,) = problem_of(num_blocks=1).probe.blocks
    halves = [Weighed(spec=each.spec, weight=each.weight.to(dtype), inputs=each.inputs) for each in linears]
    same = [Weighed(spec=each.spec, weight=each.weight.float(), inputs=each.inputs) for each in halves]
    assert dsa.reductions(halves, pairs=PAIRS[:8]) == dsa.reductions(same, pairs=PAIRS[:8])


def test_weights_are_read_slab_by_slab_with_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    (linears,) = problem_of(num_blocks=1).probe.blocks
    whole = dsa.reductions(linears, pairs=PAIRS)
    monkeypatch.setattr(dsa, "_SLAB", 30)
    for pair, value in dsa.reductions(linears, pairs=PAIRS).items():
        assert value == pytest.approx(whole[pair], rel=1e-5, nan_ok=True), pair


def test_equal_blocks_get_equal_rates() -> None:
    problem = problem_of()
    same = [
        [
            Weighed(spec=spec, weight=first.weight, inputs=first.inputs)
            for spec, first in zip(specs, problem.probe.blocks[0], strict=True)
        ]
        for specs in problem.layout.blocks
    ]
    problem.probe.blocks = same
    for search in (0, 2):
        found = dsa.allocate(problem, search=search, population=4)
        assert found.plan.digest == found.baselines["uniform"].digest
        assert rates_by_block(found) == [problem.target] * NUM_BLOCKS


def test_one_block_is_uniform() -> None:
    found = dsa.allocate(problem_of(num_blocks=1), search=2)
    assert rates_by_block(found) == [0.6]


# The search


def test_a_planted_optimum_is_found() -> None:
    levels = dsa.allocate(problem_of(), expression="SIGMOID-STD-EXP").plan
    problem = problem_of(loss=distance_to(levels))
    found = dsa.allocate(problem, search=8)
    before = distance_to(levels)(dsa.allocate(problem_of()).plan)
    after = distance_to(levels)(found.plan)
    assert before > 20, before
    assert after <= 1 + (before - 1) / 10, (before, after, Expression.numbered(int(found.steps[0].selected)))


@pytest.mark.parametrize("seed", range(5))
def test_the_result_is_the_best_of_all_tried_and_no_worse_than_uniform_or_published(seed: int) -> None:
    noise: dict[bytes, float] = {}
    generator = torch.Generator().manual_seed(seed)

    def loss(plan: Plan) -> float:
        return noise.setdefault(plan.digest, float(torch.rand(1, generator=generator)))

    problem = problem_of(seed=seed, loss=loss)
    found = dsa.allocate(problem, search=3, population=6, seed=seed)
    tried = [plan.digest for _, _, plans in problem.probe.asked for plan in plans]
    assert tried[:2] == [found.baselines["uniform"].digest, found.baselines["dsa"].digest]
    assert loss(found.plan) == min(noise.values()) == min(found.steps[0].scores)
    assert len(set(tried)) == len(tried) == len(found.steps[0].lambdas)
    assert found.baselines["dsa"].digest == dsa.allocate(problem_of(seed=seed)).plan.digest


def test_the_search_measures_once_and_asks_once_per_generation() -> None:
    problem = problem_of(loss=lambda plan: float(int.from_bytes(plan.digest[:4], "big")))
    found = dsa.allocate(problem, search=4, population=7)
    assert problem.probe.measured == 1
    assert [len(plans) for _, _, plans in problem.probe.asked] == [7, 7, 7, 7]
    assert {step for step, _, _ in problem.probe.asked} == {found.steps[0].name} == {"dsa"}
    assert found.steps[0].lambdas == tuple(lam for _, lambdas, _ in problem.probe.asked for lam in lambdas)


def test_the_selected_number_gives_the_plan_back_without_a_search(caplog: pytest.LogCaptureFixture) -> None:
    hidden = dsa.allocate(problem_of(), expression="POW-MEAN-LOG").plan
    with caplog.at_level(logging.INFO):
        found = dsa.allocate(problem_of(loss=distance_to(hidden)), search=4)
    expression = str(Expression.numbered(int(found.steps[0].selected)))
    assert f"DSA: {expression} has the least loss" in caplog.text
    again = dsa.allocate(problem_of(), expression=expression)
    assert again.plan.digest == found.plan.digest


def test_equal_seeds_give_equal_searches_and_others_do_not() -> None:
    hidden = dsa.allocate(problem_of(), expression="TANH-MEAN").plan

    def searched(seed: int) -> Allocation:
        return dsa.allocate(problem_of(loss=distance_to(hidden)), search=3, population=6, seed=seed)

    assert searched(3).steps == searched(3).steps
    assert searched(3).plan.digest == searched(3).plan.digest
    assert searched(3).steps != searched(4).steps


def test_uniform_wins_where_it_is_best() -> None:
    problem = problem_of()
    uniform = dsa.allocate(problem).baselines["uniform"]
    found = dsa.allocate(problem_of(loss=distance_to(uniform)), search=2)
    assert found.plan.digest == uniform.digest
    assert found.steps[0].selected == 0.0


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_never_wins(broken: float) -> None:
    published = dsa.allocate(problem_of()).plan
    found = dsa.allocate(
        problem_of(loss=lambda plan: 1e30 if plan.digest == published.digest else broken), search=2, population=6
    )
    assert found.plan.digest == published.digest
    every = dsa.allocate(problem_of(loss=lambda _: broken), search=2, population=6)
    assert every.steps[0].selected == every.steps[0].lambdas[0] == 0.0


def test_expressions_without_a_finite_value_or_a_difference_are_not_tried() -> None:
    problem = problem_of(spread=0.5)
    found = dsa.allocate(problem, search=6, population=16)
    by_block = [dsa.reductions(linears, pairs=PAIRS) for linears in problem.probe.blocks]
    given = Expression.parse(dsa.PUBLISHED).number
    numbers = [int(number) for number in found.steps[0].lambdas if number not in (0, given)]
    assert len(numbers) > 30
    for expression in map(Expression.numbered, numbers):
        reduced = [block[expression.pre_op, expression.reduction] for block in by_block]
        values = expression.transformed(torch.tensor(reduced, dtype=torch.float64))
        assert values.isfinite().all(), (str(expression), values)
        assert values.max() > values.min(), (str(expression), values)


def test_children_have_the_parts_of_their_parents_but_for_one() -> None:
    chance = dsa.random.Random(0)
    one, other = Expression.parse("ABSLOG-VAR-ATAN-ASIN"), Expression.parse("TANH-MEAN-LOG")
    children = [dsa._child([one, other], chance) for _ in range(300)]
    inherited = [
        (child.pre_op in (one.pre_op, other.pre_op))
        + (child.reduction in (one.reduction, other.reduction))
        + (child.transforms in (one.transforms, other.transforms))
        for child in children
    ]
    assert min(inherited) == 2
    assert 0.5 < inherited.count(3) / len(inherited) < 0.9  # half are not mutated, some mutate into what they had
    assert len({child.transforms for child in children}) > 10
    assert all(1 <= len(child.transforms) <= 2 and set(child.transforms) <= set(TRANSFORMS) for child in children)


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -0.1}, r"^--set allocation\.lam: -0.1 "),
        ({"lam": math.nan}, r"^--set allocation\.lam: nan "),
        ({"search": -1}, r"^--set allocation\.search: -1 "),
        ({"population": 3}, r"^--set allocation\.population: 3 is not at least 4"),
        ({"seed": -1}, r"^--set allocation\.seed: -1 "),
        ({"expression": "VAR"}, r"^--set allocation\.expression: 'VAR' is not PRE_OP-REDUCTION"),
        ({"expression": "ABSLOG-GEOMETRIC_MEAN"}, r"^--set allocation\.expression: .* not finite in block 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dsa.allocate(problem_of(), **settings)


def test_a_broken_block_is_named() -> None:
    problem = problem_of()
    problem.probe.blocks[3][1].weight[2, 2] = math.nan
    with pytest.raises(ValueError, match="ABSLOG-VAR-ATAN-ASIN is not finite in block 3"):
        dsa.allocate(problem)


def test_authors_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^--allocation dsa: not in the released code; use --mode paper$"):
        dsa.allocate(problem_of(mode="authors"))
