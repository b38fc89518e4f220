"""Is DSA the published function of the scores?"""

import logging
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from neuronal_ray.algorithms.allocations import dsa
from neuronal_ray.core.layout import Group, Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.operators import PAIRS
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


def some_blocks(layout: Layout, seed: int, *, spread: float = 0.4) -> list[list[LinearData]]:
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
            linears.append(LinearData(spec=spec, weight=weight, inputs=inputs))
        blocks.append(linears)
    return blocks


class FakeProbe:
    """Holds the blocks, and has no other query than `measure`."""

    def __init__(self, blocks: list[list[LinearData]]) -> None:
        self.blocks = blocks
        self.measured = 0

    def measure(self, function: Callable[[Sequence[LinearData]], Any]) -> list[Any]:
        self.measured += 1
        function = pickle.loads(pickle.dumps(function))  # as the pool does
        return [function(linears) for linears in self.blocks]


def problem_of(*, target: float = 0.6, seed: int = 0, spread: float = 0.4, num_blocks: int = NUM_BLOCKS) -> Problem:
    layout = layout_of(num_blocks)
    probe = FakeProbe(some_blocks(layout, seed, spread=spread))
    return Problem(layout=layout, target=target, mode="paper", probe=probe)


def literal_importance(linears: Sequence[LinearData]) -> float:
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
    found = dsa.allocate(problem, lam=0.15)
    for plan in [found.plan, *found.baselines.values()]:
        plan.check(problem.layout)
        assert plan.total == budget


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_reductions_of_a_block_are_those_of_its_scores_together(pair: tuple[str, str]) -> None:
    (linears,) = problem_of(num_blocks=1, spread=0.2).probe.blocks
    together = torch.cat([(each.weight.abs() * each.inputs.norm).flatten() for each in linears])[None, :]
    whole = LinearData(
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
    halves = [LinearData(spec=each.spec, weight=each.weight.to(dtype), inputs=each.inputs) for each in linears]
    same = [LinearData(spec=each.spec, weight=each.weight.float(), inputs=each.inputs) for each in halves]
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
            LinearData(spec=spec, weight=first.weight, inputs=first.inputs)
            for spec, first in zip(specs, problem.probe.blocks[0], strict=True)
        ]
        for specs in problem.layout.blocks
    ]
    problem.probe.blocks = same
    found = dsa.allocate(problem)
    assert found.plan.digest == found.baselines["uniform"].digest
    assert rates_by_block(found) == [problem.target] * NUM_BLOCKS


def test_one_block_is_uniform() -> None:
    found = dsa.allocate(problem_of(num_blocks=1))
    assert rates_by_block(found) == [0.6]


# Bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lam": -0.1}, r"^--set allocation\.lam: -0.1 "),
        ({"lam": math.nan}, r"^--set allocation\.lam: nan "),
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
