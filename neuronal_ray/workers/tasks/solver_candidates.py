"""How good are candidates of a method that solves? They go side by side, with one factorization for all."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.comparison import Comparison
from neuronal_ray.workers.solved_levels import LevelStore, solve_at_levels
from neuronal_ray.workers.tasks.candidates import CandidateTasks

_SolvedStep = tuple[int, list[Recording], list[list[Recording]], list[list[dict[Group, Statistic]]]]


class SolverTasks(CandidateTasks):
    """Statistics of the calibration text on the dense stream are held for one block at a time."""

    def solved_trials(
        self, plans: Sequence[Plan], tokens: Int64[Tensor, "sequences length"], *, divergence: bool = False
    ) -> list[Trial]:
        """`trial` for a method that solves: statistics of `tokens` on the dense stream, shared by all plans."""
        (dense, *streams), comparisons = self._take(self._beside(plans, tokens), [Comparison() for _ in plans])
        for index, dense, streams, observed in self._solved_walk(dense, streams, plans, (SquareSum,)):  # noqa: B007, B020
            for comparison, (sparse,) in zip(comparisons, observed, strict=True):
                comparison.add(self.layout, index, self._dense, sparse)
        return self._give(
            [dense, *streams],
            comparisons,
            lambda: [
                comparison.trial(self._text.divergence(stream, self.replica) if divergence else ())
                for comparison, stream in zip(comparisons, streams, strict=True)
            ],
        )

    def solved_losses(self, plans: Sequence[Plan], tokens: Int64[Tensor, "sequences length"]) -> list[float]:
        """`loss` for a method that solves."""
        (dense, *streams), _ = self._take(self._beside(plans, tokens), None)
        for _, dense, streams, _ in self._solved_walk(dense, streams, plans, ()):  # noqa: B007, B020
            pass
        return self._give([dense, *streams], None, lambda: [self._loss(recordings) for recordings in streams])

    def _beside(self, plans: Sequence[Plan], tokens: Int64[Tensor, "sequences length"]) -> list[list[Recording]]:
        """The calibration text, and the search text once for every plan."""
        return [self.replica.start(tokens)[1], *(self._text.recordings for _ in plans)]

    def _solved_walk(
        self,
        dense: list[Recording],
        streams: list[list[Recording]],
        plans: Sequence[Plan],
        kinds: tuple[type[Statistic], ...],
    ) -> Iterator[_SolvedStep]:
        """After each block its index, the calibration text, the search text under every plan and what was observed."""
        assert self.pruner.statistic is not None
        for index, dense, (grams,) in self._dense_walk(dense, (self.pruner.statistic,)):  # noqa: B020
            factors = self._factorized(index, grams)
            passed = []
            for plan, recordings in zip(plans, streams, strict=True):
                weights = self._solve(index, factors, plan)
                passed.append(self.replica.run_with(index, recordings, weights, kinds))
            streams = [recordings for recordings, _ in passed]
            yield index, dense, streams, [observed for _, observed in passed]

    def solve_levels(
        self, blocks: range, levels: Sequence[int], tokens: Int64[Tensor, "sequences length"]
    ) -> LevelStore:
        """The linears of a range of blocks solved at each of `levels` on the dense stream; on the host."""
        assert self.pruner.statistic is not None
        (recordings,), store = self._take([self.replica.start(tokens)[1]], LevelStore(self.pruner.levels))
        solved = {}
        walk = self._dense_walk(recordings, (self.pruner.statistic,), wanted=blocks)
        for index, recordings, statistics in walk:  # noqa: B007
            if not statistics:
                continue
            factors = self._factorized(index, statistics[0])
            with self.stopwatch.measure("solving"):
                for spec in self.layout.blocks[index]:
                    weight, factor = self.replica.weight(spec), factors[spec.reads]
                    solved[spec.linear] = solve_at_levels(spec, weight, factor, self.pruner, levels)
        store = store.merge(LevelStore(self.pruner.levels, solved).to(torch.device("cpu")))
        return self._give([recordings], store, lambda: store)

    def keep_levels(self, store: LevelStore) -> None:
        """Candidates are put together from these solutions from now on."""
        self._levels = store.of(self.blocks).to(self._host)
