"""What a method or a refinement returns against its contract is a fault that names it, never a silent result."""

import math
from dataclasses import replace

import pytest
import torch

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.algorithms.methods import magnitude
from neuronal_ray.algorithms.refinements import dsnot
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Group, Linear, LinearSpec
from neuronal_ray.core.stats import Moments

WEIGHT = torch.arange(1.0, 13.0).reshape(3, 4)
SPEC = LinearSpec(
    linear=Linear(0, "up"), rows=3, columns=4, reads=Group(0, 0), consumer=None, sources=None, sub_block="attention"
)


@pytest.mark.parametrize(
    ("score", "complaint"),
    [
        (torch.ones(3, 3), r"a score of shape \[3, 3\] for a weight of shape \[3, 4\]"),
        (torch.ones(2, 4), r"a score of shape \[2, 4\]"),
        (WEIGHT * math.nan, "a score that is NaN"),
    ],
)
def test_a_score_that_cannot_rank_is_a_fault_of_the_method(
    monkeypatch: pytest.MonkeyPatch, score: torch.Tensor, complaint: str
) -> None:
    monkeypatch.setattr(magnitude, "METHOD", replace(magnitude.METHOD, score=lambda *_: score))
    with pytest.raises(ValueError, match=f"^--method magnitude: returned .*{complaint}") as caught:
        LinearPruner(method="magnitude").ranked(WEIGHT, None, lower_ties_first=True)
    assert not isinstance(caught.value, BadInput)


@pytest.mark.parametrize("mask", [torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 3, dtype=torch.bool)])
def test_a_refinement_that_changes_counts_is_a_fault_of_its_own(
    monkeypatch: pytest.MonkeyPatch, mask: torch.Tensor
) -> None:
    monkeypatch.setattr(dsnot, "REFINEMENT", replace(dsnot.REFINEMENT, refine=lambda *_: mask))
    pruner = LinearPruner(method="magnitude", refinement="dsnot", parts=("attention",))
    ranks = pruner.ranked(WEIGHT, None, lower_ties_first=True)
    removed = torch.full((3,), 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^--refinement dsnot: block 0 up: removes other numbers of weights"):
        pruner.refined(SPEC, WEIGHT, ranks, removed, None, Moments.of(torch.ones(1, 2, 4)))
