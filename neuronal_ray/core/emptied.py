"""Linears and blocks that a plan leaves without weights."""

from collections import Counter
from collections.abc import Collection, Iterable

import torch

from neuronal_ray.core.layout import Layout, Linear
from neuronal_ray.core.plan import Counts, Plan


def emptied(layout: Layout, plan: Plan, zeros: Counts) -> list[Linear]:
    """Return the linears of which no weight stays, in order; `zeros` counts those of each row that are zero anyway."""
    return [
        spec.linear
        for spec in layout
        if int(torch.maximum(plan.removed[spec.linear], zeros[spec.linear]).sum()) == spec.size
    ]


def name_emptied(empty: Collection[Linear], linears: Iterable[Linear]) -> str:
    """Return the names of the emptied among all `linears`, whole blocks as one; empty where there are none."""
    sizes, lost = Counter(linear.block for linear in linears), Counter(linear.block for linear in empty)
    blocks = [f"block {block} (all {sizes[block]} linears)" for block in sorted(lost) if lost[block] == sizes[block]]
    return ", ".join(blocks + [str(linear) for linear in sorted(empty) if lost[linear.block] < sizes[linear.block]])
