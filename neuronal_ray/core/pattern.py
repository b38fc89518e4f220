"""N:M patterns: N of every M aligned inputs stay. A pattern is a ranking and a plan that fits it.

One convention: N counts the weights *kept*, as NVIDIA's 2:4 does. (Wanda's and OWL's code counts the removed ones;
the two coincide for 2:4 and 4:8 only.)
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
from neuronal_ray.core.levels import whole_levels
from neuronal_ray.core.masks import rank_rows
from neuronal_ray.core.plan import Plan, PlanError, Rates

_LONGEST_GROUP = 64


@dataclass(frozen=True)
class Pattern:
    """`kept` of every `group` aligned inputs of a row stay; None: a number of its own for every linear (n:8)."""

    kept: int | None
    group: int


def parse_pattern(text: str) -> Pattern | None:
    """The pattern of "2:4", "3:8", ..., the mixed one of "n:8", None of "unstructured"; else ValueError."""
    if text == "unstructured":
        return None
    found = re.fullmatch(r"(n|[1-9][0-9]?):([1-9][0-9]?)", text, flags=re.ASCII)
    if found is not None:
        kept, group = None if found[1] == "n" else int(found[1]), int(found[2])
        if 2 <= group <= _LONGEST_GROUP and (kept is None or kept < group):
            return Pattern(kept, group)
    raise BadInput(
        f"--pattern: {text!r} is not a pattern, expected unstructured, N:M (N of every M inputs stay, 1 <= N < M <= "
        f"{_LONGEST_GROUP}, for example 2:4) or n:M (N chosen for every linear, for example n:8)"
    )


def pattern_target(pattern: Pattern) -> float:
    """The fraction of weights that a fixed pattern removes."""
    assert pattern.kept is not None, pattern
    return (pattern.group - pattern.kept) / pattern.group


def check_pattern(columns: Mapping[Linear, int], pattern: Pattern) -> None:
    """Raise PlanError for the first linear whose inputs are no multiple of the group."""
    for linear, count in columns.items():
        if count % pattern.group:
            raise PlanError(f"--pattern: {linear} has {count} inputs, expected a multiple of {pattern.group}")


def rank_in_groups(
    score: Float[Tensor, "rows columns"], group: int, *, lower_ties_first: bool = True
) -> Int[Tensor, "rows columns"]:
    """A ranking whose cut at n * columns / group removes the n lowest scores of every group, for every n.

    Ordered by the position in the group's ascending order, then by the group; ties and dtype as in `rank_rows`.
    """
    rows, columns = score.shape
    assert columns % group == 0, (columns, group)
    num_groups = columns // group
    positions = rank_rows(score.reshape(-1, group), lower_ties_first=lower_ties_first)  # [rows * groups, group]
    positions = positions.to(rank_dtype(columns)).view(rows, num_groups, group)
    groups = torch.arange(num_groups, dtype=positions.dtype, device=score.device)
    return (positions * num_groups + groups[:, None]).flatten(1)  # [rows, groups, group] -> [rows, columns]


def pattern_plan(layout: Layout, rates: Rates, *, target: float, pattern: Pattern) -> Plan:
    """The plan of a fixed pattern, whatever the rates; of a mixed one the plan that follows the linears' rates.

    Mixed: every linear loses n of each group, n the same for all linears of a block that are asked the same rate but
    for a few (core.levels.whole_levels). Linears count as large as they are, the largest go first, and of one size
    those of the blocks left down, by remainder.

    So the budget is met exactly when the rates are whole, or when some linears add up to what is missing; else it
    is missed by at most half of the largest linear's weights per n, and by at most half of the smallest's if the
    linears smaller than any size add up to it, as those of a model of several blocks do.
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
