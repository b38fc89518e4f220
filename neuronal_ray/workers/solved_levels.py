"""Linears solved at a few levels of sparsity; a search puts its candidates together from them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.core.layout import Linear, LinearSpec
from neuronal_ray.core.level_plan import level_of
from neuronal_ray.core.packing import Packed, pack
from neuronal_ray.core.plan import Plan


@dataclass(frozen=True, eq=False)
class LevelStore:
    """Level n of `levels` of a linear has n / levels of its weights removed; 0 is the dense weight, all is zero."""

    levels: int
    solved: Mapping[Linear, Mapping[int, Packed]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all solutions."""
        return sum(packed.nbytes for solutions in self.solved.values() for packed in solutions.values())

    def weights(
        self, specs: Sequence[LinearSpec], plan: Plan, dense: Callable[[LinearSpec], Tensor]
    ) -> dict[Linear, Tensor]:
        """Return the linears at the levels of `plan`, or at the nearest level there is (of two the sparser)."""
        return {spec.linear: self._weight(spec, int(plan.removed[spec.linear].sum()), dense) for spec in specs}

    def _weight(self, spec: LinearSpec, removed: int, dense: Callable[[LinearSpec], Tensor]) -> Tensor:
        wanted = level_of(spec, removed, self.levels)
        solutions = self.solved[spec.linear]
        known = (0, *solutions, self.levels)
        level = min(known, key=lambda known: (abs(known - wanted), -known))
        if level == 0:
            return dense(spec)
        if level == self.levels:
            return torch.zeros_like(dense(spec))
        return solutions[level].unpack()

    def merge(self, other: "LevelStore") -> "LevelStore":
        """Return the linears of both."""
        assert self.levels == other.levels
        return LevelStore(self.levels, {**self.solved, **other.solved})

    def of(self, blocks: range) -> "LevelStore":
        """Return the linears of some blocks."""
        return LevelStore(
            self.levels, {linear: found for linear, found in self.solved.items() if linear.block in blocks}
        )

    def to(self, device: torch.device) -> "LevelStore":
        """Return a copy on `device`."""
        return LevelStore(
            self.levels,
            {
                linear: {level: packed.to(device) for level, packed in solutions.items()}
                for linear, solutions in self.solved.items()
            },
        )


def solve_at_levels(
    spec: LinearSpec, weight: Tensor, factor: object, pruner: LinearPruner, wanted: Iterable[int]
) -> dict[int, Packed]:
    """Return one linear solved at each of the levels `wanted`, packed."""

    def solution(level: int) -> Packed:
        solved = pruner.solved_at(weight, factor, removed=level * spec.size // pruner.levels)
        return pack(solved + 0.0)  # a negative zero would be kept as a value

    return {level: solution(level) for level in wanted}
