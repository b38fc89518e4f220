"""The problem that an allocation solves, the queries it may send to the model, and the form of its result."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from jaxtyping import Float, Float32, Float64, Int, Int32
from torch import Tensor

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Layout, Linear, LinearData, LinearSpec
from neuronal_ray.core.level_plan import level_plan
from neuronal_ray.core.pattern import Pattern, pattern_plan
from neuronal_ray.core.plan import Counts, Plan, Rates, exact_plan, floored_plan

Result = TypeVar("Result")


class BlockTask(Protocol):
    """One block with the search text that enters it in the dense model, for allocations that learn by gradients."""

    specs: Sequence[LinearSpec]
    weights: Mapping[Linear, Float[Tensor, "rows columns"]]
    ranks: Mapping[Linear, Int[Tensor, "rows columns"]]
    num_texts: int

    def dense_output(self, text: int) -> Float[Tensor, "sequences tokens features"]:
        """Return the dense block's output for chunk `text` of the search text."""
        ...

    def output(
        self, text: int, weights: Mapping[Linear, Float[Tensor, "rows columns"]]
    ) -> Float[Tensor, "sequences tokens features"]:
        """Return the block's output for chunk `text` with other weights; differentiable in the weights."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedLinear:
    """One linear under a plan, with the inputs it has in the dense model.

    `gram` is the sum over the tokens of the calibration text of the inputs' outer products, `ranks` the ranking of
    each row's weights (0 is removed first), `removed` the number of weights that each row loses under the plan.
    """

    spec: LinearSpec
    weight: Float[Tensor, "rows columns"]
    gram: Float32[Tensor, "columns columns"]
    ranks: Int[Tensor, "rows columns"]
    removed: Int32[Tensor, " rows"]


class Probe(Protocol):
    """The queries that an allocation or a row step may send to the model; tasks run in parallel over the pool.

    Functions passed to a query must be picklable: module-level functions, or `functools.partial` of them.
    """

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        """Return one Trial on the search text per plan; the record names the plans by `lambdas`.

        A plan may be built when it is first accessed: earlier plans are evaluated in the meantime.
        """
        ...

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        """Return per plan the mean KL(dense || sparse) per token of each search sequence, in nats."""
        ...

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        """Return the mean divergence over the sequences in `part` of `plan` with each of `changes` applied."""
        ...

    def differences(self, plan: Plan) -> Mapping[Linear, Float64[Tensor, " rows"]]:
        """Return per linear the norm of each row's output difference, dense against `plan`; experts are left out."""
        ...

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        """Return per plan the mean cross-entropy per predicted token of the search text, in nats."""
        ...

    def measure(self, function: Callable[[Sequence[LinearData]], Result]) -> list[Result]:
        """Apply `function` to the linears of every block of the dense model; results are in the order of blocks."""
        ...

    def learn(self, function: Callable[[BlockTask], Result]) -> list[Result]:
        """Apply `function` to every block with its search text; results are in the order of blocks."""
        ...

    def map_linears(self, function: Callable[[RankedLinear], Result], plan: Plan) -> dict[Linear, Result]:
        """Apply `function` to every linear under `plan`, with the Gram matrix of its dense inputs."""
        ...


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What is known of a problem before the model is read; enough to check settings against.

    `criterion` is what candidates are compared by, "alignment" or "kl". `levels` > 0: every linear removes a multiple
    of 1 / levels of its weights, because it was solved at these levels before the search. `rows_fixed_by` says why the
    rows of a linear cannot differ and is empty where they can. `row_step` names the row step that the user asked for.
    """

    target: float
    mode: str
    pattern: Pattern | None = None
    criterion: str = "alignment"
    levels: int = 0
    rows_fixed_by: str = ""
    row_step: str | None = None

    @property
    def rows_may_differ(self) -> bool:
        """Whether the rows of one linear may lose different numbers of weights."""
        return not self.rows_fixed_by and self.pattern is None and not self.levels


@dataclass(frozen=True, kw_only=True)
class Problem(Terms):
    """What an allocation is given: the terms, the model's layout, and a probe for queries to the model.

    `samples` is the number of search sequences, `zeros` counts the weights of each row that are zero in the input and
    stay so; empty where there are none.
    """

    layout: Layout
    probe: Probe
    samples: int = 8
    zeros: Counts = field(default_factory=dict)

    def plan(self, rates: Rates, *, rows_adapted: bool) -> Plan:
        """Return the plan for `rates` under the mode's budget: exact, the pattern's, or the released code's floors."""
        if self.pattern is not None:
            return pattern_plan(self.layout, rates, target=self.target, pattern=self.pattern)
        if self.levels:
            return level_plan(self.layout, rates, target=self.target, levels=self.levels)
        if self.mode == "authors":
            return floored_plan(self.layout, rates, floor_kept=rows_adapted)
        return exact_plan(self.layout, rates, target=self.target, zeros=self.zeros)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One search over a set of lambdas: the score of each candidate (lower is better) and the lambda selected."""

    name: str
    lambdas: tuple[float, ...]
    scores: tuple[float, ...]
    selected: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The selected plan, the rates behind it, the searches that led to it, and named plans to compare it with."""

    plan: Plan
    rates: Rates
    steps: tuple[Step, ...] = ()
    baselines: dict[str, Plan] = field(default_factory=dict)

    def with_rows(self, rates: Rates, plan: Plan, *, steps: tuple[Step, ...] = ()) -> "Allocation":
        """Return the allocation after a row step; the plan before it becomes a baseline."""
        baselines = self.baselines | {"before rows": self.plan}
        return Allocation(plan=plan, rates=rates, steps=self.steps + steps, baselines=baselines)
