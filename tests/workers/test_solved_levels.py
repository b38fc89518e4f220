"""Are candidates put together from what the solver gives at their levels?"""

import pickle

import pytest
import torch

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.level_plan import level_plan
from neuronal_ray.core.pattern import Pattern, pattern_plan
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.stats import Gram
from neuronal_ray.workers.solved_levels import LevelStore, solve_at_levels


def spec_of(block: int) -> LinearSpec:
    reads = Group(block, 0)
    return LinearSpec(linear=Linear(block, "linear"), rows=12, columns=16, reads=reads, consumer=None, sources=None)


SPECS = [spec_of(block) for block in range(2)]
LAYOUT = Layout(tuple(SPECS))
RECIPE = LinearPruner(method="sparsegpt")


def weight_of(spec: LinearSpec) -> torch.Tensor:
    generator = torch.Generator().manual_seed(spec.linear.block)
    return torch.randn(spec.rows, spec.columns, generator=generator)


def factor_of(spec: LinearSpec, pruner: LinearPruner = RECIPE) -> object:
    generator = torch.Generator().manual_seed(10 + spec.linear.block)
    return pruner.factorized(Gram.of(torch.randn(2, 30, spec.columns, generator=generator)))


@pytest.fixture(scope="module")
def store() -> LevelStore:
    parts = [
        LevelStore(20, {spec.linear: solve_at_levels(spec, weight_of(spec), factor_of(spec), RECIPE, (8, 10, 16))})
        for spec in SPECS
    ]
    return parts[0].merge(parts[1])


@pytest.mark.parametrize("level", [8, 10, 16])
def test_a_stored_level_is_the_solver_s_answer(store: LevelStore, level: int) -> None:
    plan = level_plan(LAYOUT, uniform_rates(LAYOUT, lambda _: level / 20), target=level / 20, levels=20)
    found = store.weights(SPECS, plan, weight_of)
    for spec in SPECS:
        expected = RECIPE.solved(spec, weight_of(spec), factor_of(spec), plan)
        assert torch.equal(found[spec.linear], expected)
        assert int((expected == 0).sum()) == level * spec.size // 20


@pytest.mark.parametrize(
    ("asked", "nearest"), [(7, 8), (9, 10), (13, 16), (12, 10), (17, 16), (18, 20), (19, 20), (3, 0), (4, 8)]
)
def test_between_levels_the_nearest_is_taken_of_two_the_sparser(store: LevelStore, asked: int, nearest: int) -> None:
    plan, other = (
        level_plan(LAYOUT, uniform_rates(LAYOUT, lambda _, level=level: level / 20), target=level / 20, levels=20)
        for level in (asked, nearest)
    )
    found, expected = (store.weights(SPECS, plan, weight_of) for plan in (plan, other))
    assert all(torch.equal(found[linear], expected[linear]) for linear in found)


def test_nothing_removed_is_the_dense_weight_and_everything_is_zero(store: LevelStore) -> None:
    for level, expected in ((0, weight_of(SPECS[0])), (20, torch.zeros(12, 16))):
        plan = level_plan(
            LAYOUT, uniform_rates(LAYOUT, lambda _, level=level: level / 20), target=level / 20, levels=20
        )
        assert torch.equal(store.weights(SPECS[:1], plan, weight_of)[SPECS[0].linear], expected)


def test_its_size_is_that_of_its_parts(store: LevelStore) -> None:
    kept = sum(12 * 16 - level * 12 * 16 // 20 for level in (8, 10, 16))
    assert store.nbytes == 2 * (3 * 12 * 16 // 8 + 4 * kept)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_under_a_mixed_pattern_a_level_is_a_number_of_each_group(method: str) -> None:
    pruner = LinearPruner(method=method, pattern=Pattern(None, 8))
    assert pruner.levels == 8
    solved = {
        spec.linear: solve_at_levels(spec, weight_of(spec), factor_of(spec, pruner), pruner, range(1, 8))
        for spec in SPECS
    }
    store = pickle.loads(pickle.dumps(LevelStore(8, solved)))  # as it comes from a worker
    for level in range(1, 8):
        plan = pattern_plan(
            LAYOUT, uniform_rates(LAYOUT, lambda _, level=level: level / 8), target=level / 8, pattern=pruner.pattern
        )
        found = store.weights(SPECS, plan, weight_of)
        for spec in SPECS:
            expected = pruner.solved(spec, weight_of(spec), factor_of(spec, pruner), plan)
            assert torch.equal(found[spec.linear], expected), (level, spec.linear)
            assert ((expected.view(spec.rows, -1, 8) == 0).sum(dim=2) == level).all()
