"""N:M patterns, in which N of every M aligned inputs stay: their rankings and their plans.

N counts the weights *kept*, as in NVIDIA's 2:4. (Wanda's and OWL's code counts the removed weights; the two
conventions coincide only for 2:4 and 4:8.)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.ranking import rank_dtype
from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.level_plan import whole_levels
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.plan import Plan, PlanError, Rates

_LONGEST_GROUP = 64


@dataclass(frozen=True)
class Pattern:
    """`kept` of every `group` aligned inputs of a row stay; None: every linear has its own number (n:8)."""

    kept: int | None
    group: int


def parse_pattern(text: str) -> Pattern | None:
    """Parse "2:4", "3:8", ..., the mixed "n:8" or "unstructured" (None). Raises BadInput for any other text."""
    if text == "unstructured":
        return None
    match = re.fullmatch(r"(n|[1-9][0-9]?):([1-9][0-9]?)", text, flags=re.ASCII)
    if match is not None:
        kept, group = None if match[1] == "n" else int(match[1]), int(match[2])
        if 2 <= group <= _LONGEST_GROUP and (kept is None or kept < group):
            return Pattern(kept, group)
    raise BadInput(
        f"--pattern: {text!r} is not a pattern, expected unstructured, N:M (N of every M inputs stay, 1 <= N < M <= "
        f"{_LONGEST_GROUP}, for example 2:4) or n:M (N chosen for every linear, for example n:8)"
    )


def pattern_target(pattern: Pattern) -> float:
    """Return the fraction of weights that a fixed pattern removes."""
    assert pattern.kept is not None, pattern
    return (pattern.group - pattern.kept) / pattern.group


def check_pattern(columns: Mapping[Linear, int], pattern: Pattern) -> None:
    """Raise PlanError for the first linear whose number of inputs is no multiple of the group."""
    for linear, count in columns.items():
        if count % pattern.group:
            raise PlanError(f"--pattern: {linear} has {count} inputs, expected a multiple of {pattern.group}")


def rank_in_groups(
    score: Float[Tensor, "rows columns"], group: int, *, lower_ties_first: bool = True
) -> Int[Tensor, "rows columns"]:
    """Return a ranking whose n * columns / group lowest weights are the n lowest of every group, for every n.

    Weights are ordered by their position in the group's ascending order, then by group; ties and dtype as in
    `rank_rows`.
    """
    rows, columns = score.shape
    assert columns % group == 0, (columns, group)
    num_groups = columns // group
    positions = rank_rows(score.reshape(-1, group), lower_ties_first=lower_ties_first)  # [rows * groups, group]
    positions = positions.to(rank_dtype(columns)).view(rows, num_groups, group)
    groups = torch.arange(num_groups, dtype=positions.dtype, device=score.device)
    return (positions * num_groups + groups[:, None]).flatten(1)  # [rows, groups, group] -> [rows, columns]


def pattern_plan(layout: Layout, rates: Rates, *, target: float, pattern: Pattern) -> Plan:
    """Return the plan of a fixed pattern, whatever the rates, or the plan of a mixed pattern that follows the rates.

    In a mixed pattern every linear loses n of each group; n is the same for all linears of a block that have the same
    rate, except for the few that `core.level_plan.whole_levels` moves to meet the budget.

    The budget is met exactly when the rates are whole levels or when some linears add up to the rest. Otherwise it is
    missed by at most half of the weights that the largest linear loses per level; by at most half of the smallest
    linear's if, for every size, the smaller linears add up to that size, as in a model of several blocks.
    """
    check_pattern({spec.linear: spec.columns for spec in layout}, pattern)
    if pattern.kept is None:
        counts = whole_levels(layout, rates, budget=round(target * layout.prunable), levels=pattern.group)
    else:
        counts = {spec.linear: pattern.group - pattern.kept for spec in layout}
    removed = {}
    for spec in layout:
        of_row = counts[spec.linear] * spec.columns // pattern.group
        removed[spec.linear] = torch.full((spec.rows,), of_row, dtype=torch.int32)
    return Plan(removed)
