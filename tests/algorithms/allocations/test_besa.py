"""Does BESA learn the rates that its formula gives, deterministically, within the budget, and do they help?"""

import math
import pickle
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from conftest import MakeModel
from torch import Tensor
from torch.func import functional_call

from neuronal_ray.algorithms.allocations.besa import allocate, initial_logits, learn_block, output_error
from neuronal_ray.core.kernels.masking import zero_lowest
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.masks import lowest_mask, rank_rows
from neuronal_ray.core.plan import Plan, exact_plan
from neuronal_ray.core.problem import Problem
from neuronal_ray.models.blocks import Stream, find_linears

SETTINGS: dict[str, object] = {
    "target": 0.6,
    "by_row": False,
    "candidates": 100,
    "steps": 4,
    "learning_rate": 0.05,
    "penalty": 5.0,
}

pytestmark = pytest.mark.usefixtures("one_thread")


class Task:
    """A block of a real tiny model with two chunks of random text; it keeps what it was asked."""

    def __init__(self, stream: Stream, index: int) -> None:
        tokens = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))
        self.block, self.index = stream.blocks[index], index
        self.inputs = [stream.start(part) for part in tokens.split(2)]
        for before in range(index):
            self.inputs = [stream.block(before, recording) for recording in self.inputs]
        self.outputs = [stream.block(index, recording).hidden for recording in self.inputs]
        linears = {Linear(index, path): module for path, module in find_linears(self.block).items()}
        self.specs = [
            LinearSpec(
                linear=linear,
                rows=module.weight.shape[0],
                columns=module.weight.shape[1],
                reads=Group(index, 0),
                consumer=None,
                sources=None,
            )
            for linear, module in linears.items()
        ]
        self.weights = {linear: module.weight.data for linear, module in linears.items()}
        self.ranks = {linear: rank_rows(weight.abs()) for linear, weight in self.weights.items()}
        self.num_texts = len(self.inputs)
        self.asked: list[tuple[int, Mapping[Linear, Tensor]]] = []

    def dense_output(self, text: int) -> Tensor:
        return self.outputs[text]

    def output(self, text: int, weights: Mapping[Linear, Tensor]) -> Tensor:
        self.asked.append((text, weights))
        args, kwargs = self.inputs[text].calls[self.index]
        named = {f"{linear.path}.weight": weight for linear, weight in weights.items()}
        with torch.enable_grad():
            output = functional_call(self.block, named, (self.inputs[text].hidden, *args), kwargs)
        return output[0] if isinstance(output, tuple) else output

    def error(self, removed: Mapping[Linear, Tensor]) -> float:
        """The block's error, in the mean over the chunks."""
        weights = {linear: zero_lowest(w, self.ranks[linear], removed[linear]) for linear, w in self.weights.items()}
        errors = [output_error(self.outputs[text], self.output(text, weights)) for text in range(self.num_texts)]
        return float(torch.stack(errors).mean())


@pytest.fixture
def stream(make_model: MakeModel) -> Stream:
    """A small random LLaMA of two blocks."""
    return Stream(make_model("llama", hidden_size=16, intermediate_size=24, num_hidden_layers=2))


@pytest.fixture
def task(stream: Stream) -> Task:
    return Task(stream, 1)


def literal_rates(
    task: Task, *, target: float, by_row: bool, candidates: int, steps: int, learning_rate: float, penalty: float
) -> dict[Linear, list[float]]:
    """The formula weight by weight: soft factors in the graph, the hard ones put over them, Adam written out."""
    p = [d / candidates for d in range(candidates + 1)]
    start = initial_logits(target, candidates).float()
    logits = {spec.linear: torch.stack([start] * (spec.rows if by_row else 1)).requires_grad_() for spec in task.specs}
    first = {linear: torch.zeros_like(value) for linear, value in logits.items()}
    second = {linear: torch.zeros_like(value) for linear, value in logits.items()}
    for step in range(steps):
        text = step % task.num_texts
        weights, removed, size = {}, torch.zeros(()), 0
        for spec in task.specs:
            beta = logits[spec.linear].softmax(dim=1)
            rates = (beta * torch.tensor(p)).sum(dim=1)
            probabilities = []  # of a weight of rank k to go, for every group
            for k in range(spec.columns):
                over = [d for d in range(candidates + 1) if d * spec.columns // candidates > k]
                probabilities.append(beta[:, over].sum(dim=1))
            table = torch.stack(probabilities, dim=1)  # [groups, columns]
            rows = []
            for i in range(spec.rows):
                group = i if by_row else 0
                count = round(float(rates[group].detach() * spec.columns))
                factors = []
                for j in range(spec.columns):
                    rank = int(task.ranks[spec.linear][i, j])
                    soft = 1 - table[group, rank]
                    hard = 0.0 if rank < count else 1.0
                    factors.append(hard + (soft - soft.detach()))
                rows.append(torch.stack(factors))
            weights[spec.linear] = task.weights[spec.linear] * torch.stack(rows)
            removed = removed + rates.mean() * spec.rows * spec.columns
            size += spec.rows * spec.columns
        dense, sparse = task.dense_output(text), task.output(text, weights)
        features = []
        for f in range(dense.shape[2]):
            features.append((dense[..., f] - sparse[..., f]).pow(2).sum() / dense[..., f].pow(2).sum())
        loss = torch.stack(features).mean() + penalty * ((removed / size - target) / target) ** 2
        gradients = torch.autograd.grad(loss, list(logits.values()))
        for linear, gradient in zip(logits, gradients, strict=True):
            first[linear] = 0.9 * first[linear] + 0.1 * gradient
            second[linear] = 0.999 * second[linear] + 0.001 * gradient**2
            mean = first[linear] / (1 - 0.9 ** (step + 1))
            spread = (second[linear] / (1 - 0.999 ** (step + 1))).sqrt()
            moved = logits[linear].detach() - learning_rate * mean / (spread + 1e-8)
            logits[linear] = moved.requires_grad_()
    found = {}
    for spec in task.specs:
        rates = (logits[spec.linear].softmax(dim=1) * torch.tensor(p)).sum(dim=1).tolist()
        found[spec.linear] = rates if by_row else rates * spec.rows
    return found


@pytest.mark.parametrize("candidates", [100, 10])
@pytest.mark.parametrize("by_row", [False, True])
def test_the_rates_are_those_of_the_formula_weight_by_weight(
    make_model: MakeModel, by_row: bool, candidates: int
) -> None:
    task = Task(Stream(make_model("llama", hidden_size=8, intermediate_size=12, num_hidden_layers=2)), 1)
    settings = SETTINGS | {"by_row": by_row, "candidates": candidates}
    expected = literal_rates(task, **settings)
    found = learn_block(task, **settings)
    assert found.keys() == expected.keys()
    for linear, rates in found.items():
        assert rates.tolist() == pytest.approx(expected[linear], abs=2e-4), linear
    moved = max(abs(float(rates.max()) - 0.6) for rates in found.values())
    assert moved > 0.005, "the rates hardly moved: the comparison sees nothing"


@pytest.mark.parametrize("target", [0.001, 0.1, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("candidates", [1, 7, 100])
def test_learning_starts_at_the_target(target: float, candidates: int) -> None:
    logits = initial_logits(target, candidates)
    rates = torch.arange(candidates + 1, dtype=torch.float64) / candidates
    assert float(logits.softmax(dim=0) @ rates) == pytest.approx(target, abs=1e-6)


def test_half_is_equal_shares_as_in_the_released_code() -> None:
    assert initial_logits(0.5, 100).softmax(dim=0).tolist() == pytest.approx([1 / 101] * 101)


def test_the_block_runs_with_hard_cuts_on_the_chunks_in_turn(task: Task) -> None:
    learn_block(task, **(SETTINGS | {"steps": 5}))
    assert [text for text, _ in task.asked] == [0, 1, 0, 1, 0]
    for linear, weight in task.asked[0][1].items():  # the first step's rate is the target
        rows, columns = weight.shape
        removed = torch.full((rows,), round(0.6 * columns)).int()
        kept = ~lowest_mask(task.ranks[linear], removed)
        assert torch.equal(weight.detach(), task.weights[linear] * kept), linear


@pytest.mark.parametrize("by_row", [False, True])
def test_learning_is_deterministic_and_leaves_the_model_alone(task: Task, by_row: bool) -> None:
    before = {linear: weight.clone() for linear, weight in task.weights.items()}
    settings = SETTINGS | {"by_row": by_row}
    one = learn_block(task, **settings)
    with torch.no_grad():
        two = learn_block(task, **settings)
    for linear, rates in one.items():
        assert rates.dtype == torch.float64
        assert rates.shape == (len(task.weights[linear]),)
        assert 0 < float(rates.min()) <= float(rates.max()) < 1
        assert torch.equal(rates, two[linear]), linear
        assert torch.equal(task.weights[linear], before[linear])
    assert all(parameter.grad is None for parameter in task.block.parameters())


def test_linears_that_the_output_does_not_depend_on_are_kept_near_the_target_by_the_penalty(task: Task) -> None:
    """As an expert that no token reaches: it has no gradient."""

    class Deaf(Task):
        def output(self, text: int, weights: Mapping[Linear, Tensor]) -> Tensor:
            reached = next(iter(weights.values()))
            return self.outputs[text] + 0 * reached.sum()

    task.__class__ = Deaf
    for linear, rates in learn_block(task, **(SETTINGS | {"steps": 20})).items():
        assert rates.tolist() == pytest.approx([0.6] * len(rates), abs=0.02), linear


@pytest.mark.parametrize("by_row", [False, True])
def test_weights_that_matter_less_go_first_and_the_error_falls(stream: Stream, by_row: bool) -> None:
    attention = stream.blocks[0].self_attn
    attention.o_proj.weight.data *= 0.01  # nothing of the attention arrives
    stream.blocks[0].mlp.gate_proj.weight.data[::2] *= 0.01  # nor half of the gate
    task = Task(stream, 0)
    learned = learn_block(task, **(SETTINGS | {"by_row": by_row, "steps": 60}))
    in_attention = [float(rates.mean()) for linear, rates in learned.items() if "self_attn" in linear.path]
    in_mlp = [float(rates.mean()) for linear, rates in learned.items() if "mlp" in linear.path]
    assert min(in_attention) > max(in_mlp), (in_attention, in_mlp)
    if by_row:
        gate = learned[Linear(0, "mlp.gate_proj")]
        assert float(gate[::2].mean()) > float(gate[1::2].mean()) + 0.02, gate
    layout = Layout(tuple(task.specs))
    uniform = exact_plan(layout, {s.linear: torch.full((s.rows,), 0.6).double() for s in task.specs}, target=0.6)
    plan = exact_plan(layout, learned, target=0.6)
    assert plan.total == uniform.total
    before, after = task.error(uniform.removed), task.error(plan.removed)
    assert after < 0.9 * before, (before, after)


def test_the_error_is_that_of_each_feature_relative_to_its_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, sparse = torch.randn(2, 3, 4, 5, generator=generator)
    dense[..., 2] = 0
    expected = 0.0
    for f in range(5):
        squares = sum(float(x) ** 2 for x in dense[..., f].flatten())
        errors = sum(float(x) ** 2 for x in (dense - sparse)[..., f].flatten())
        expected += errors / (squares or 1) / 5
    assert float(output_error(dense, sparse)) == pytest.approx(expected, rel=1e-5)


def test_an_error_that_is_not_finite_names_the_block(task: Task) -> None:
    task.outputs[1] = torch.full_like(task.outputs[1], math.nan)
    with pytest.raises(ValueError, match="block 1 is nan"):
        learn_block(task, **SETTINGS)


class Probe:
    """Runs a function on tasks, as it would arrive in another process."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.calls = 0

    def learn(self, function: Callable[[Task], object]) -> list[object]:
        self.calls += 1
        return [pickle.loads(pickle.dumps(function))(task) for task in self.tasks]


def problem_of(stream: Stream, *, target: float = 0.6, rows_fixed_by: str = "") -> tuple[Problem, Probe]:
    probe = Probe([Task(stream, index) for index in range(2)])
    layout = Layout(tuple(spec for task in probe.tasks for spec in task.specs))
    problem = Problem(layout=layout, target=target, mode="paper", probe=probe, rows_fixed_by=rows_fixed_by)
    return problem, probe


def rows_differ(plan: Plan) -> bool:
    """By more than the rounding of one common rate."""
    return any(int(counts.max() - counts.min()) > 1 for counts in plan.removed.values())


@pytest.mark.parametrize("per", ["linear", "row"])
def test_the_plan_has_the_budget_to_the_weight(stream: Stream, per: str) -> None:
    problem, probe = problem_of(stream)
    found = allocate(problem, per=per, steps=20, learning_rate=0.1)
    found.plan.check(problem.layout)
    assert found.plan.total == round(0.6 * problem.layout.prunable)
    assert set(found.rates) == {spec.linear for spec in problem.layout}
    assert rows_differ(found.plan) == (per == "row")
    assert found.plan.digest != found.baselines["uniform"].digest
    assert found.baselines["uniform"].total == found.plan.total
    assert probe.calls == 1


@pytest.mark.parametrize("rows_fixed_by", ["", "--method sparsegpt shares a linear's budget"])
def test_rates_are_of_rows_where_rows_may_differ(stream: Stream, rows_fixed_by: str) -> None:
    problem, _ = problem_of(stream, rows_fixed_by=rows_fixed_by)
    found = allocate(problem, steps=20, learning_rate=0.1)
    per = "linear" if rows_fixed_by else "row"
    assert found.plan.digest == allocate(problem_of(stream)[0], per=per, steps=20, learning_rate=0.1).plan.digest
    assert rows_differ(found.plan) == (per == "row")


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_nothing_is_learned_where_nothing_can_be_shared_out(stream: Stream, target: float) -> None:
    problem, probe = problem_of(stream, target=target)
    found = allocate(problem)
    assert probe.calls == 0
    assert found.plan.total == target * problem.layout.prunable


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per", "block"),
        ("candidates", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("penalty", -1.0),
        ("penalty", math.nan),
    ],
)
def test_bad_settings_are_refused_by_name(stream: Stream, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--set allocation.{name}: .*got {value}"):
        allocate(problem_of(stream)[0], **{name: value})
