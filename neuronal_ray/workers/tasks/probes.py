"""What do allocations ask besides candidates' scores (allocations.Probe)?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar, cast

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from neuronal_ray.core.layout import Linear, Weighed
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import RankedLinear
from neuronal_ray.core.stats import Gram
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.replica import Replica
from neuronal_ray.workers.search_text import SearchText
from neuronal_ray.workers.tasks.candidates import CandidateTasks

Result = TypeVar("Result")


class BlockText:
    """One dense block with the search text that enters it (allocations.BlockTask)."""

    def __init__(
        self,
        replica: Replica,
        index: int,
        inputs: Sequence[Recording],
        outputs: Sequence[Recording],
        ranks: Mapping[Linear, Int[Tensor, "rows columns"]],
    ) -> None:
        self.specs = replica.layout.blocks[index]
        self.weights = {spec.linear: replica.weight(spec) for spec in self.specs}
        self.ranks = {spec.linear: ranks[spec.linear] for spec in self.specs}
        self.num_texts = len(inputs)
        self._replica, self._index, self._inputs, self._outputs = replica, index, inputs, outputs

    def dense_output(self, text: int) -> Float[Tensor, "sequences tokens features"]:
        """The block's output for chunk `text`."""
        return self._outputs[text].hidden

    def output(
        self, text: int, weights: Mapping[Linear, Float[Tensor, "rows columns"]]
    ) -> Float[Tensor, "sequences tokens features"]:
        """The same with other weights; differentiable in them."""
        return self._replica.differentiable(self._index, self._inputs[text], weights)


class ProbeTasks(CandidateTasks):
    """Answers about blocks, linears, rows and small changes."""

    def set_excerpt(self, sequences: range) -> None:
        """Keep some of the search sequences as a text of their own, for `changed`."""
        excerpt = SearchText(self.replica, self._text.tokens[sequences.start : sequences.stop])
        (recordings,), _ = self._take([excerpt.recordings], None)
        recordings, _ = self._dense_statistics(recordings, ())
        excerpt.keep_dense_end(recordings if self.is_last else ())
        self._excerpts[sequences] = excerpt
        return self._give([recordings], None, lambda: None)

    def changed(self, changes: Sequence[Counts], plan: Plan, sequences: range) -> list[float]:
        """Mean divergence over an excerpt (see set_excerpt) of `plan` with each of `changes` made to it, in order.

        Text passes through the blocks before a change once for all changes.
        """
        text, num_blocks = self._excerpts[sequences], self.layout.num_blocks
        firsts = [min((linear.block for linear in change), default=num_blocks) for change in changes]
        plans = [replace(plan, removed={**plan.removed, **change}) for change in changes]
        begun = [number for number, first in enumerate(firsts) if first < self.blocks.start]
        entering, found = self._take([text.recordings] * (1 + len(begun)), dict[int, float]())
        streams = dict(zip(begun, entering[1:], strict=True))  # those that earlier shards have changed
        recordings = entering[0]

        def passed(number: int, recordings: list[Recording], *, first: int) -> None:
            """One changed stream through the rest of this shard."""
            (streams[number],) = self._pass([recordings], [plans[number]], first=first)
            if self.is_last:
                divergences = text.divergence(streams.pop(number), self.replica)
                found[number] = sum(divergences) / len(divergences)

        for number in begun:
            passed(number, streams[number], first=self.blocks.start)
        for index in self.replica.visited(self.blocks):
            for number, first in enumerate(firsts):
                if first == index:
                    passed(number, recordings, first=index)
            if index < max(firsts):
                recordings, _ = self.replica.run_with(index, recordings, self._weights(index, plan))
        if self.is_last:
            for number in (number for number, first in enumerate(firsts) if first == num_blocks):
                passed(number, recordings, first=num_blocks)
        leaving = [streams[number] for number in sorted(streams)]
        return self._give([recordings, *leaving], found, lambda: [found[number] for number in range(len(changes))])

    def differences(self, sequences: range, plan: Plan) -> dict[Linear, Float64[Tensor, " rows"]]:
        """Over some search sequences, each row's sum of squared differences of its output, dense and under `plan`.

        Both models run side by side, each on its own stream. Experts are left out: other tokens may reach them.
        """
        _, recordings = self.replica.start(self._text.tokens[sequences.start : sequences.stop])
        (dense, sparse), found = self._take([recordings, recordings], dict[Linear, Float64[Tensor, " rows"]]())
        for index in self.replica.visited(self.blocks):
            specs = [spec for spec in self.layout.blocks[index] if spec.expert is None]
            with self.replica.outputs(specs) as ours:
                dense, _ = self.replica.run(index, dense)
            with self.replica.outputs(specs) as theirs:
                sparse, _ = self.replica.run_with(index, sparse, self._weights(index, plan))
            for spec in specs:
                pairs = zip(ours[spec.linear], theirs[spec.linear], strict=True)
                sums = [(one.float() - other.float()).square().flatten(0, -2).sum(dim=0) for one, other in pairs]
                found[spec.linear] = torch.stack(sums).sum(dim=0).double().cpu()
        return self._give([dense, sparse], found, lambda: found)

    def measure(self, block: int, function: Callable[[Sequence[Weighed]], Result]) -> Result:
        """`function` of the dense linears of one block and their inputs' statistics."""
        if block not in self.blocks:
            return cast(Result, self._handed)
        with self.replica.stream.resident(block):
            return function(
                [
                    Weighed(spec=spec, weight=self.replica.weight(spec), inputs=self._inputs(spec, self._statistics))
                    for spec in self.layout.blocks[block]
                ]
            )

    def learn(self, blocks: range, function: Callable[[BlockText], Result]) -> list[Result]:
        """`function` of each block of the range, with the search text as it enters it in the dense model."""
        (recordings,), results = self._take([self._text.recordings], list[Result]())
        for index in self.replica.visited(self._until(blocks.stop)):
            outputs, _ = self.replica.run(index, recordings)
            if index in blocks:
                block = BlockText(self.replica, index, recordings, outputs, self._ranking(index))
                results.append(function(block))
            recordings = outputs
        return self._give([recordings], results, lambda: results)

    def map_linears(
        self,
        blocks: range,
        function: Callable[[RankedLinear], Result],
        plan: Plan,
        tokens: Int64[Tensor, "sequences length"],
    ) -> dict[Linear, Result]:
        """`function` of the linears of a range of blocks, on the dense stream."""
        (recordings,), results = self._take([self.replica.start(tokens)[1]], dict[Linear, Result]())
        for index, recordings, statistics in self._dense_walk(recordings, (Gram,), wanted=blocks):  # noqa: B007, B020
            for spec in self.layout.blocks[index] if statistics else ():
                gram = self._inputs(spec, statistics[0])
                assert isinstance(gram, Gram)
                with self.stopwatch.measure("rows"):
                    results[spec.linear] = function(
                        RankedLinear(
                            spec=spec,
                            weight=self.replica.weight(spec),
                            gram=gram.total,
                            ranks=self._ranking(index)[spec.linear],
                            removed=plan.removed[spec.linear],
                        )
                    )
        return self._give([recordings], results, lambda: results)
