"""What is made of one block: its inputs' statistics, rankings, refined masks, solutions, and weights under a plan.

A sparse model is never stored: it is the ranking cut by a plan, or the solver's answer to it, put in place block by
block while text passes through.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import Ranks
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Group, Linear, LinearSpec
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import Statistic
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.comparison import merged
from neuronal_ray.workers.masked_weights import Cuts
from neuronal_ray.workers.replica import Statistics, Weights
from neuronal_ray.workers.shard import Shard
from neuronal_ray.workers.solved_levels import LevelStore
from neuronal_ray.workers.spec import WorkerSpec

FEW_TOKENS = 32
"""An expert that fewer tokens were routed to is judged by the inputs of all experts of its kind in its block."""


class BlockWork(Shard):
    """The blocks of a shard, one at a time."""

    def __init__(self, spec: WorkerSpec) -> None:
        super().__init__(spec)
        self.pruner = spec.pruner
        self._host = torch.device("cpu") if spec.streams else self.device  # where rankings are kept
        self._statistics: Statistics | None = None
        self._ranks: dict[Linear, Ranks] = {}
        self._visiting: tuple[int, Mapping[Linear, Ranks]] | None = None  # the last block's, where blocks visit
        self._levels: LevelStore | None = None
        self._cuts = Cuts(self.replica)

    def _near(self, tensor: Tensor) -> Tensor:
        """On the device."""
        return tensor.to(self.device)

    def _here(self, statistics: Statistics) -> Statistics:
        """Those of this shard's blocks, on the device."""
        return {
            group: statistic.to(self.device) for group, statistic in statistics.items() if group.block in self.blocks
        }

    def _until(self, stop: int) -> range:
        """The blocks of this shard before block `stop`."""
        return range(self.blocks.start, max(self.blocks.start, min(self.blocks.stop, stop)))

    def _dense_walk(
        self,
        recordings: list[Recording],
        kinds: tuple[type[Statistic], ...],
        *,
        wanted: range | None = None,
    ) -> Iterator[tuple[int, list[Recording], list[dict[Group, Statistic]]]]:
        """Block after block of the dense model: its index, the text after it and the statistics of its inputs.

        Of a range `wanted`: blocks up to its end, statistics of its own only.
        """
        for index in self.replica.visited(self.blocks if wanted is None else self._until(wanted.stop)):
            seen = kinds if wanted is None or index in wanted else ()
            with self.stopwatch.measure("dense pass"):
                recordings, observed = self.replica.run(index, recordings, seen)
            for statistics in observed:
                check_finite(statistics)
            yield index, recordings, observed

    def _dense_statistics(
        self, recordings: list[Recording], kinds: tuple[type[Statistic], ...]
    ) -> tuple[list[Recording], list[dict[Group, Statistic]]]:
        """The text after this shard, and what was seen in its blocks."""
        found: list[dict[Group, Statistic]] = [{} for _ in kinds]
        with self.stopwatch.measure("dense pass"):
            for index in self.replica.visited(self.blocks):
                recordings, observed = self.replica.run(index, recordings, kinds)
                for known, seen in zip(found, observed, strict=True):
                    known |= seen
        for known in found:
            check_finite(known)
        return recordings, found

    def _pass(
        self, streams: Sequence[list[Recording]], plans: Sequence[Plan], *, first: int | None = None
    ) -> list[list[Recording]]:
        """Texts that enter block `first`, after the last block of this shard, each under its plan; they pass each block
        together.
        """
        passed = list(streams)
        for index in self.replica.visited(range(self.blocks.start if first is None else first, self.blocks.stop)):
            for number, plan in enumerate(plans):
                passed[number], _ = self.replica.run_with(index, passed[number], self._weights(index, plan))
        return passed

    def _weights(self, index: int, plan: Plan) -> Weights:
        """A candidate's weights of block `index`, until the next one's: the ranking cut, or what was solved at the
        levels of `plan`.
        """
        if self._levels is None:
            return self._cut(index, plan, self._ranking(index))
        with self.stopwatch.measure("masks"):
            found = self._levels.weights(self.layout.blocks[index], plan, self.replica.weight)
            return {linear: self._near(weight) for linear, weight in found.items()}

    def _ranking(self, index: int) -> Mapping[Linear, Ranks]:
        """The ranking of block `index`, on the device, and maybe of others. Of a block that visits it is made, or
        comes from the host, once for all that is asked of it until another block's is.
        """
        if not self.spec.streams:
            return self._ranks
        if self._visiting is None or self._visiting[0] != index:
            self._visiting = None  # to make room
            with self.replica.stream.resident(index):
                kept = [spec.linear for spec in self.layout.blocks[index] if spec.linear in self._ranks]
                ranks = {linear: self._near(self._ranks[linear]) for linear in kept}
                self._visiting = (index, ranks or self._rank_block(index, self._statistics))
        return self._visiting[1]

    def _kept(self, ranks: Mapping[Linear, Ranks]) -> dict[Linear, Ranks]:
        """Where rankings are kept that nothing makes again."""
        return {linear: found.to(self._host) for linear, found in ranks.items()}

    def _cut(self, index: int, plan: Plan, ranks: Mapping[Linear, Ranks], *, lasting: bool = False) -> Weights:
        """See Cuts.weights."""
        with self.stopwatch.measure("masks"):
            return self._cuts.weights(index, plan, ranks, lasting=lasting)

    def _rank_block(
        self, index: int, statistics: Statistics | None, *, lower_ties_first: bool = True
    ) -> dict[Linear, Ranks]:
        ranks = {}
        with self.stopwatch.measure("ranking"):
            for spec in self.layout.blocks[index]:
                with self._naming(spec.linear):
                    ranks[spec.linear] = self.pruner.ranked(
                        self.replica.weight(spec), self._inputs(spec, statistics), lower_ties_first=lower_ties_first
                    )
        return ranks

    @contextmanager
    def _naming(self, linear: Linear) -> Iterator[None]:
        """Put the method and the linear in front of a method's BadInput."""
        try:
            yield
        except BadInput as error:
            raise BadInput(f"--method {self.pruner.method}: {linear}: {error}") from error

    def _pruned_block(
        self, index: int, plan: Plan, observed: Sequence[Statistics]
    ) -> tuple[Weights, Mapping[Linear, Ranks]]:
        """The weights of block `index` under `plan`, judged by what was just observed (method, refinement), and the
        rankings that they are cuts of; none where they were solved for.
        """
        if self.pruner.solves:
            return self._solve(index, self._factorized(index, observed[0]), plan), {}
        statistics = observed[0] if observed else None
        ranks = self._rank_block(index, statistics, lower_ties_first=plan.lower_ties_first)
        if self.pruner.refinement is not None:
            ranks = self._refined(index, plan, ranks, statistics, observed[-1])
        return self._cut(index, plan, ranks), ranks

    def _refined(
        self,
        index: int,
        plan: Plan,
        ranks: Mapping[Linear, Ranks],
        statistics: Statistics | None,
        moments: Statistics | None,
    ) -> dict[Linear, Ranks]:
        """Rankings of block `index` whose cuts under `plan` are the refined masks."""
        found = {}
        with self.stopwatch.measure("refinement"):
            for spec in self.layout.blocks[index]:
                seen = self._inputs(spec, moments)
                assert seen is not None
                found[spec.linear] = self.pruner.refined(
                    spec,
                    self.replica.weight(spec),
                    ranks[spec.linear],
                    plan.removed[spec.linear],
                    self._inputs(spec, statistics),
                    seen,
                )
        return found

    def _factorized(self, index: int, grams: Statistics) -> dict[Group, object]:
        """The solver's factor of each group of block `index`."""
        factors = {}
        with self.stopwatch.measure("factorization"):
            for group, first in self.layout.first_readers(index).items():
                inputs = self._inputs(first, grams)
                assert inputs is not None
                with self._naming(first.linear):
                    factors[group] = self.pruner.factorized(inputs)
        return factors

    def _solve(self, index: int, factors: Mapping[Group, object], plan: Plan) -> Weights:
        with self.stopwatch.measure("solving"):
            return {
                spec.linear: self.pruner.solved(spec, self.replica.weight(spec), factors[spec.reads], plan)
                for spec in self.layout.blocks[index]
            }

    def _inputs(self, spec: LinearSpec, statistics: Statistics | None) -> Statistic | None:
        """What was seen of a linear's inputs; an expert that saw few tokens has the sum over its like."""
        if statistics is None:
            return None
        own = statistics.get(spec.reads)
        if spec.expert is None:
            assert own is not None, spec.linear
            return own
        if own is not None and own.tokens >= FEW_TOKENS:
            return own
        return merged(statistics, self.layout.routed[spec.reads])


def check_finite(statistics: Mapping[Group, Statistic]) -> None:
    """Raise BadInput naming the first block whose activations are not finite; the device is waited for once."""
    finite = [torch.isfinite(statistic.norm).all() for statistic in statistics.values()]
    if not finite:
        return
    for group, found in zip(statistics, torch.stack(finite).tolist(), strict=True):
        if not found:
            raise BadInput(f"--model: NaN or infinite activations in block {group.block} of the dense model")
