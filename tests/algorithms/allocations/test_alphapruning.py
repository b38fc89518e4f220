"""Does AlphaPruning remove more from the blocks whose spectra have the higher exponents?"""

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from neuronal_ray.algorithms.allocations import alphapruning
from neuronal_ray.core.layout import Group, Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.problem import Problem

SHAPES = [("attention.query", 24, 24), ("mlp.up", 40, 24), ("mlp.down", 24, 40)]


def weighed(block: int, path: str, weight: torch.Tensor) -> LinearData:
    rows, columns = weight.shape
    spec = LinearSpec(
        linear=Linear(block, path), rows=rows, columns=columns, reads=Group(block, 0), consumer=None, sources=None
    )
    return LinearData(spec=spec, weight=weight, inputs=None)


class MadeUp:
    """A probe of random blocks: the spread of the columns' scales, hence the spectrum, differs from block to block.

    Every second block has a linear fewer, so blocks differ in size, too.
    """

    def __init__(self, num_blocks: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.blocks = []
        for block in range(num_blocks):
            linears = []
            for path, rows, columns in SHAPES[: 3 - block % 2]:
                steepness = float(3 * torch.rand((), generator=generator))
                weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-steepness, 0, columns)
                linears.append(weighed(block, path, weight.bfloat16() if path == "mlp.up" else weight))
            self.blocks.append(linears)
        self.use(self.blocks)

    def use(self, blocks: list[list[LinearData]]) -> None:
        self.blocks = blocks
        self.layout = Layout(tuple(linear.spec for linears in blocks for linear in linears))

    def measure(self, function: Callable[[Sequence[LinearData]], Any]) -> list[Any]:
        function = pickle.loads(pickle.dumps(function))  # as on its way to another process
        return [function(linears) for linears in self.blocks]


def problem_of(probe: MadeUp, target: float, mode: str = "paper") -> Problem:
    return Problem(layout=probe.layout, target=target, mode=mode, probe=probe)


def literal_exponent(weight: torch.Tensor, bound: str) -> float:
    """Singular values and a loop over cut-offs, written from the formula."""
    values = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    counts, edges = np.histogram(np.log10(values), bins=100)
    x = 10 ** edges[np.argmax(counts)]
    lowest = 0.95 * x if bound == "strict" else math.log10(0.95 * x)
    best, exponent = math.inf, math.nan
    for i in range(len(values) - 1):
        if not lowest <= values[i] <= 1.5 * x:
            continue
        n = len(values) - i
        alpha = 1 + n / (np.log(values[i:]).sum() - n * np.log(values[i]))
        distance = np.abs(1 - (values[i:] / values[i]) ** (1 - alpha) - np.arange(n) / n).max()
        if alpha > 1 and distance < best:
            best, exponent = distance, alpha
    return float(exponent)


def literal_rates(probe: MadeUp, target: float, epsilon: float, bound: str) -> list[float]:
    metrics, sizes = [], []
    for linears in probe.blocks:
        found = [literal_exponent(linear.weight, bound) for linear in linears]
        metrics.append(sum(found) / len(found))
        sizes.append(sum(linear.weight.numel() for linear in linears))
    low, high = min(metrics), max(metrics)
    levels = [(metric - low) / (high - low) * 2 * epsilon + 1 - epsilon for metric in metrics]
    scale = sum(size * target for size in sizes) / sum(size * level for size, level in zip(sizes, levels, strict=True))
    return [level * scale for level in levels]


def rates_by_block(probe: MadeUp, target: float, **settings: Any) -> list[float]:
    found = alphapruning.allocate(problem_of(probe, target), **settings).rates
    by_block = []
    for linears in probe.blocks:
        rates = torch.cat([found[linear.spec.linear] for linear in linears])
        assert rates.dtype == torch.float64
        assert bool((rates == rates[0]).all())
        by_block.append(float(rates[0]))
    return by_block


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("bound", ["strict", "compat"])
@pytest.mark.parametrize("seed", range(3))
def test_rates_are_the_mapping_written_out(seed: int, bound: str, epsilon: float) -> None:
    probe = MadeUp(4, seed=seed)
    wanted = literal_rates(probe, 0.6, epsilon, bound)
    assert rates_by_block(probe, 0.6, epsilon=epsilon, bound=bound) == pytest.approx(wanted, abs=1e-6)


def test_the_mean_over_weights_is_the_target() -> None:
    probe = MadeUp(5, seed=4)
    sizes = [sum(linear.spec.size for linear in linears) for linears in probe.blocks]
    rates = rates_by_block(probe, 0.7)
    assert len(set(sizes)) > 1
    assert sum(rate * size for rate, size in zip(rates, sizes, strict=True)) / sum(sizes) == pytest.approx(0.7)


def test_the_block_with_the_highest_exponent_is_the_sparsest() -> None:
    probe = MadeUp(5, seed=3)
    metrics = [np.mean([literal_exponent(linear.weight, "strict") for linear in linears]) for linears in probe.blocks]
    rates = rates_by_block(probe, 0.6)
    assert int(np.argmax(metrics)) == int(np.argmax(rates))
    assert max(rates) / min(rates) == pytest.approx(1.3 / 0.7)


@pytest.mark.parametrize("target", [0.0, 0.05, 0.37, 0.8, 0.99])
def test_the_budget_is_exact(target: float) -> None:
    probe = MadeUp(4, seed=5)
    found = alphapruning.allocate(problem_of(probe, target))
    found.plan.check(probe.layout)
    assert found.plan.total == round(target * probe.layout.prunable)


def test_the_budget_is_exact_when_rates_go_beyond_1() -> None:
    probe = MadeUp(4, seed=5)
    assert max(rates_by_block(probe, 0.8)) > 1
    found = alphapruning.allocate(problem_of(probe, 0.8)).plan
    shares = [
        sum(int(found.removed[linear.spec.linear].sum()) for linear in linears)
        / sum(linear.spec.size for linear in linears)
        for linears in probe.blocks
    ]
    assert max(shares) == 1
    assert found.total == round(0.8 * probe.layout.prunable)


def test_equal_blocks_get_the_target() -> None:
    probe = MadeUp(1, seed=6)
    weights = [linear.weight for linear in probe.blocks[0]]
    probe.use([[weighed(block, str(index), w) for index, w in enumerate(weights)] for block in range(3)])
    assert rates_by_block(probe, 0.7) == [0.7] * 3


def test_a_zero_weight_does_not_count_and_its_block_is_rated_by_the_others() -> None:
    probe = MadeUp(3, seed=7)
    wanted = rates_by_block(probe, 0.6)
    probe.blocks[0].append(weighed(0, "zero", torch.zeros(2, 2)))
    probe.use(probe.blocks)
    assert rates_by_block(probe, 0.6) == pytest.approx(wanted, abs=5e-3)  # only the block's size changed
    probe.use([*probe.blocks, [weighed(3, "zero", torch.zeros(24, 24))]])
    rates = rates_by_block(probe, 0.6)
    assert rates[3] == pytest.approx(sum(rates[:3]) / 3)


@pytest.mark.parametrize("weight", [torch.zeros(6, 9), 2.0 * torch.eye(7)], ids=["zero", "identity"])
def test_a_model_without_exponents_gets_the_target(weight: torch.Tensor) -> None:
    probe = MadeUp(0, seed=0)
    probe.use([[weighed(block, "only", weight)] for block in range(3)])
    assert rates_by_block(probe, 0.7) == [0.7] * 3


def test_a_rank_deficient_weight_gives_finite_rates() -> None:
    probe = MadeUp(3, seed=8)
    weight = probe.blocks[1][0].weight
    weight[12:] = weight[:12]
    for bound in ("strict", "compat"):
        assert all(0 < rate < 1 for rate in rates_by_block(probe, 0.5, bound=bound))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    probe = MadeUp(3, seed=9)
    probe.blocks[2][1].weight[3, 4] = value
    with pytest.raises(ValueError, match="--model: NaN or infinite weights in block 2"):
        alphapruning.allocate(problem_of(probe, 0.7))


@pytest.mark.parametrize("epsilon", [-0.01, 1.01, math.nan])
def test_a_bad_epsilon_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"--set allocation\.epsilon: .*expected a number from 0 to 1"):
        alphapruning.allocate(problem_of(MadeUp(2, seed=0), 0.7), epsilon=epsilon)


def test_an_unknown_bound_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--set allocation\.bound: 'loose', expected one of: strict, compat"):
        alphapruning.allocate(problem_of(MadeUp(2, seed=0), 0.7), bound="loose")
