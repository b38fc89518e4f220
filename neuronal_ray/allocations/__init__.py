"""Allocations, one file each: how the sparsity is spread over blocks and rows.

An allocation module defines `allocate(problem, *, settings...) -> Allocation`; its keyword-only arguments are its
settings (`--set allocation.NAME=VALUE`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import Plan, Rates, exact_plan, floored_plan


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What an allocation is given: the model's layout, the target, the mode and a way to try plans.

    `tries(step, lambdas, plans)` returns one Trial per plan; plans run in parallel over the pool.
    """

    layout: Layout
    target: float
    mode: str
    tries: Callable[[str, Sequence[float], Sequence[Plan]], list[Trial]]

    def plan(self, rates: Rates, *, rows_adapted: bool) -> Plan:
        """The plan for `rates` under the mode's budget: exact, or the released code's floors."""
        if self.mode == "authors":
            return floored_plan(self.layout, rates, floor_kept=rows_adapted)
        return exact_plan(self.layout, rates, target=self.target)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One search over a set of lambdas: the alignment score of each candidate and the one selected."""

    name: str
    lambdas: tuple[float, ...]
    misalignments: tuple[float, ...]
    selected: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The plan chosen, the searches that led to it, and named plans on the way to compare it with."""

    plan: Plan
    steps: tuple[Step, ...] = ()
    baselines: dict[str, Plan] = field(default_factory=dict)
