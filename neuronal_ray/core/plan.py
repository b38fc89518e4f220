"""Plans: rates of removal turned into integer numbers of removed weights for each row.

There are two budgets. `exact_plan` removes exactly round(target * N) weights of the model, whatever the rates.
`floored_plan` is the released code's rule: each row is floored on its own and the drift is accepted.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64, Int32, Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Layout, Linear

Rates = Mapping[Linear, Float64[Tensor, " rows"]]
Counts = Mapping[Linear, Int32[Tensor, " rows"]]

_NEWTON_STEPS = 200
_LINEAR_DECIMALS = 4
_ROW_DECIMALS = 6


class PlanError(BadInput):
    """A plan that does not fit the model."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Removed weights per output row of every prunable linear, int32 [rows] each.

    `lower_ties_first`: of equal scores, the lower column goes first (see masks.rank_rows). `solver_rates` holds
    the rates from which a solver of the released code computes its own counts, empty under an exact budget.
    """

    removed: Counts
    lower_ties_first: bool = True
    solver_rates: Mapping[Linear, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Lay all counts out in memory: one count for all rows may be an expanded tensor, which kernels misread."""
        removed = {linear: counts.contiguous() for linear, counts in self.removed.items()}
        object.__setattr__(self, "removed", removed)

    @cached_property
    def total(self) -> int:
        """Number of weights that the plan removes."""
        return sum(int(counts.sum()) for counts in self.removed.values())

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the plan: equal only for equal plans."""
        sha = hashlib.sha256(bytes([self.lower_ties_first]))
        for linear in sorted(self.removed):
            sha.update(f"{linear.block} {linear.path} {len(self.removed[linear])} ".encode())
            sha.update(self.removed[linear].contiguous().numpy().tobytes())
            sha.update(f"{self.solver_rates.get(linear)} ".encode())
        return sha.digest()

    def check(self, layout: Layout) -> None:
        """Raise PlanError unless the plan names every linear of `layout` with counts in [0, columns]."""
        if set(self.removed) != {spec.linear for spec in layout}:
            raise PlanError("the plan names other linears than the model has")
        for spec in layout:
            counts = self.removed[spec.linear]
            if counts.shape != (spec.rows,):
                raise PlanError(f"{spec.linear}: the plan has {len(counts)} rows, the model {spec.rows}")
            if int(counts.min()) < 0 or int(counts.max()) > spec.columns:
                raise PlanError(f"{spec.linear}: removed counts outside [0, {spec.columns}]")


def uniform_rates(layout: Layout, rate_of_block: Callable[[int], float]) -> Rates:
    """Return the same rate for all rows of a block."""
    shapes = {(spec.linear.block, spec.rows) for spec in layout}
    made = {(block, rows): torch.full((rows,), rate_of_block(block), dtype=torch.float64) for block, rows in shapes}
    return {spec.linear: made[spec.linear.block, spec.rows] for spec in layout}


def water_level(
    rates: Float64[Tensor, " items"],
    sizes: Float64[Tensor, " items"],
    total: float,
    *,
    least: Float64[Tensor, " items"] | None = None,
) -> Float64[Tensor, " items"]:
    """Move all rates by one common offset and bound them to [`least`, 1], so that `sum(rates * sizes)` is `total`.

    `least` is 0 where it is None; `total` must be between the sums at the bounds.

    The sum is a non-decreasing, piecewise linear function of the offset, solved by Newton steps inside a bracket.
    Computed in numpy, which is several times faster than torch on vectors as short as a linear's rows; only the sum of
    floats is torch's, as its last bits decide ties.
    """
    values, weights, lowest = rates.numpy(), sizes.numpy(), 0.0 if least is None else least.numpy()
    low, high = -1.0 - float(values.max()), 2.0 - float(values.min())  # all rates below 0, all above 1
    offset = 0.0
    for _ in range(_NEWTON_STEPS):
        moved = values + offset
        excess = float(torch.from_numpy(np.clip(moved, lowest, 1.0) * weights).sum()) - total
        if abs(excess) <= 1e-12 * max(1.0, total):
            break
        low, high = (low, offset) if excess > 0 else (offset, high)
        slope = float(weights.sum(where=(moved > lowest) & (moved < 1)))  # sizes are integers: exact in any order
        step = offset - excess / slope if slope > 0 else high  # no slope: all are at a bound, so bisect the bracket
        offset = step if low < step < high else (low + high) / 2
        if offset in (low, high):
            break
    return torch.from_numpy(np.clip(values + offset, lowest, 1.0))


def largest_remainder(expected: Float64[Tensor, " items"], total: int, *, decimals: int) -> Int64[Tensor, " items"]:
    """Round `expected` to adjacent integers that sum to `total`; its own sum must be `total` up to rounding.

    Tie rule: of equal remainders, the earlier item is rounded up. Rounding to `decimals` removes the noise of float64
    sums before remainders are compared, so that ties are ties on every machine.
    """
    rounded = expected.numpy().round(decimals)
    counts = np.floor(rounded)
    remainder = (rounded - counts).round(decimals)
    missing = total - int(counts.sum())
    assert 0 <= missing <= len(counts), (missing, total)
    if missing:
        least = np.partition(remainder, -missing)[-missing]  # the smallest remainder that is rounded up
        counts[remainder > least] += 1
        above = np.count_nonzero(remainder > least)
        counts[np.flatnonzero(remainder == least)[: missing - above]] += 1
    return torch.from_numpy(counts.astype(np.int64))


def exact_plan(layout: Layout, rates: Rates, *, target: float, zeros: Counts | None = None) -> Plan:
    """Return the plan nearest to `rates` that removes exactly round(target * N) of all N prunable weights.

    First the budget is divided among the linears, then each linear's share among its rows. In both steps the rates
    are moved by one common offset and bounded to [0, 1] (water-filling), then rounded by largest remainder.

    `zeros` counts the weights of each row that are zero already. Where a row would lose fewer, the rates are bounded
    from below by these counts; if there are more zeros than the plan removes, they are left out of account.
    Differs: the released code clips to [0.01, 0.99], floors each row and accepts the drift.
    """
    budget = round(target * layout.prunable)
    plan = _budgeted(layout, rates, budget, {})
    if not zeros or all(bool((plan.removed[linear] >= counts).all()) for linear, counts in zeros.items()):
        return plan
    if sum(int(counts.sum()) for counts in zeros.values()) > budget:
        return plan
    return _budgeted(layout, rates, budget, zeros)


def _budgeted(layout: Layout, rates: Rates, budget: int, zeros: Counts) -> Plan:
    """Return the plan of exactly `budget` weights, with at least `zeros` (of all linears or of none) from each row."""
    sizes = torch.tensor([spec.size for spec in layout], dtype=torch.float64)
    means = torch.stack([rates[spec.linear].mean() for spec in layout])  # [linears]
    least = None
    if zeros:
        least = torch.stack([zeros[spec.linear].sum() for spec in layout]).double() / sizes  # [linears]
    shares = water_level(means, sizes, float(budget), least=least) * sizes
    linear_budgets = largest_remainder(shares, budget, decimals=_LINEAR_DECIMALS).tolist()
    removed, made = {}, dict[tuple[int, int, int, int], Int32[Tensor, " rows"]]()
    for spec, linear_budget in zip(layout, linear_budgets, strict=True):
        row_rates, row_zeros = rates[spec.linear], zeros.get(spec.linear)
        key = (id(row_rates), id(row_zeros), spec.columns, linear_budget)  # linears that share rates share counts
        if key not in made:
            made[key] = _shared_among_rows(row_rates, spec.columns, linear_budget, row_zeros)
        removed[spec.linear] = made[key]
    return Plan(removed)


def _shared_among_rows(
    rates: Float64[Tensor, " rows"], columns: int, linear_budget: int, zeros: Int32[Tensor, " rows"] | None
) -> Int32[Tensor, " rows"]:
    """Divide a linear's budget among its rows of `columns` weights: water-filling, then largest remainder."""
    if zeros is None and bool((rates == rates[0]).all()):  # the result of the general case, without its sums
        each, more = divmod(linear_budget, len(rates))
        return each + (torch.arange(len(rates)) < more).int()
    sizes = torch.full_like(rates, float(columns))
    least = None if zeros is None else zeros.double() / columns
    shares = water_level(rates, sizes, float(linear_budget), least=least) * sizes
    return largest_remainder(shares, linear_budget, decimals=_ROW_DECIMALS).int()


def floored_plan(layout: Layout, rates: Rates, *, floor_kept: bool) -> Plan:
    """Return the released code's counts: per row floor(columns * rate) removed, or floor(columns * (1 - rate)) kept.

    The two rules differ by one weight per row wherever columns * rate is no integer; neither meets a budget. With
    `floor_kept` the lower of two tied columns stays; otherwise it goes.
    """
    removed = {}
    for spec in layout:
        rate = rates[spec.linear]
        kept = spec.columns - (rate * spec.columns).floor()
        if floor_kept:
            kept = ((1 - rate) * spec.columns).floor()
        removed[spec.linear] = (spec.columns - kept).int()
    solver_rates = {linear: float(rate[0]) for linear, rate in rates.items()}
    return Plan(removed, lower_ties_first=not floor_kept, solver_rates=solver_rates)
