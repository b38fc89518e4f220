"""Allocations, one file each: how the sparsity is spread over blocks, linears and rows.

An allocation module defines `allocate(problem, *, settings...) -> Allocation`; its keyword-only arguments are its
settings (`--set allocation.NAME=VALUE`). `STATISTIC` is the kind of input statistic that `problem.probe.measure` hands
out, None when the allocation looks at no activations, or at the weights alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from jaxtyping import Float, Float32, Float64, Int, Int32
from torch import Tensor

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Layout, Linear, LinearSpec, Weighed
from neuronal_ray.core.levels import level_plan
from neuronal_ray.core.pattern import Pattern, pattern_plan
from neuronal_ray.core.plan import Counts, Plan, Rates, exact_plan, floored_plan

Result = TypeVar("Result")


class BlockTask(Protocol):
    """One block with the text that enters it in the dense model, for allocations that learn by gradients."""

    specs: Sequence[LinearSpec]
    weights: Mapping[Linear, Float[Tensor, "rows columns"]]
    ranks: Mapping[Linear, Int[Tensor, "rows columns"]]
    num_texts: int

    def dense_output(self, text: int) -> Float[Tensor, "sequences tokens features"]:
        """The block's output for the given chunk of the search text."""
        ...

    def output(
        self, text: int, weights: Mapping[Linear, Float[Tensor, "rows columns"]]
    ) -> Float[Tensor, "sequences tokens features"]:
        """The same with other weights; differentiable in them."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedLinear:
    """One dense linear with its ranking, the rows' counts under a plan, and the Gram of its inputs.

    `gram` is X^T X over the calibration text, float32.
    """

    spec: LinearSpec
    weight: Float[Tensor, "rows columns"]
    gram: Float32[Tensor, "columns columns"]
    ranks: Int[Tensor, "rows columns"]
    removed: Int32[Tensor, " rows"]


class Probe(Protocol):
    """The ways in which an allocation may ask the model; tasks run in parallel over the pool.

    Functions handed over must be picklable: of a module, or `functools.partial` of one.
    """

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        """One Trial per plan on the search text; `lambdas` are what the record calls the plans.

        A plan may be made when it is looked at: those before it can be tried meanwhile.
        """
        ...

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        """KL(dense || sparse) of the next-token distributions: per plan the mean of each search sequence, in nats."""
        ...

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        """The same for `plan` with other counts in some linears, the mean over the sequences in `part`."""
        ...

    def differences(self, plan: Plan) -> Mapping[Linear, Float64[Tensor, " rows"]]:
        """The norm over the search text of each row's difference of outputs, dense and under `plan`; no experts."""
        ...

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        """Mean cross-entropy per predicted token of the search text, in nats, under each plan."""
        ...

    def measure(self, function: Callable[[Sequence[Weighed]], Result]) -> list[Result]:
        """`function` of the linears of every block of the dense model; results in the order of blocks."""
        ...

    def map_linears(self, function: Callable[[RankedLinear], Result], plan: Plan) -> dict[Linear, Result]:
        """Return `function` of every linear of the dense model, with its counts under `plan`."""
        ...

    def learn(self, function: Callable[[BlockTask], Result]) -> list[Result]:
        """`function` of every block; results in the order of blocks."""
        ...


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an allocation is given: the model's layout, the target, the mode and a way to ask the model.

    `criterion` is what candidates are compared by, "alignment" or "kl", `samples` the number of search sequences.
    `levels` > 0: a linear removes a multiple of 1 / levels of its weights, as solved before the search.
    """

    layout: Layout
    target: float
    mode: str
    probe: Probe
    pattern: Pattern | None = None
    criterion: str = "alignment"
    samples: int = 8
    levels: int = 0

    def plan(self, rates: Rates, *, rows_adapted: bool) -> Plan:
        """The plan for `rates` under the mode's budget: exact, the pattern's, or the released code's floors."""
        if self.pattern is not None:
            return pattern_plan(self.layout, rates, target=self.target, pattern=self.pattern)
        if self.levels:
            return level_plan(self.layout, rates, target=self.target, levels=self.levels)
        if self.mode == "authors":
            return floored_plan(self.layout, rates, floor_kept=rows_adapted)
        return exact_plan(self.layout, rates, target=self.target)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One search over a set of lambdas: the score of each candidate (lower is better) and the one selected."""

    name: str
    lambdas: tuple[float, ...]
    scores: tuple[float, ...]
    selected: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The plan chosen, the rates it was made of, the searches that led to it, and named plans to compare it with."""

    plan: Plan
    rates: Rates
    steps: tuple[Step, ...] = ()
    baselines: dict[str, Plan] = field(default_factory=dict)
