"""Tasks that answer an allocation's queries about blocks, linears, rows and small changes (core/problem.py: Probe)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from neuronal_ray.core.layout import Linear, LinearData, LinearSpec
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import BlockTask, RankedLinear
from neuronal_ray.core.stats import Gram
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.passes import dense_statistics, dense_walk, pass_under_plans
from neuronal_ray.workers.pruned_blocks import candidate_weights, inputs_of, ranking
from neuronal_ray.workers.replica import Replica
from neuronal_ray.workers.search_text import SearchText
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]
RowSquares = dict[Linear, Float64[Tensor, " rows"]]


# -- small changes of a plan


def _set_excerpt(worker: Worker, sequences: range) -> Steps[None, None]:
    """Keep some of the search sequences as a text of their own, for `changed`."""
    excerpt = SearchText(worker.replica, worker.search_text.tokens[sequences.start : sequences.stop])
    worker.kept.excerpts[sequences] = excerpt
    passing = yield Passing([excerpt.recordings], None)
    recordings, _ = dense_statistics(worker, passing.texts[0], ())
    excerpt.keep_dense_end(recordings if worker.is_last else ())
    yield Passing([recordings], None)


set_excerpt = ChainTask(_set_excerpt)


def _first_blocks(worker: Worker, numbers: Sequence[int], changes: Sequence[Counts]) -> dict[int, int]:
    """Return the first block that each change touches, the number of blocks for none, by the change's number."""
    last = worker.layout.num_blocks
    return {number: min((linear.block for linear in changes[number]), default=last) for number in numbers}


def _changed(
    worker: Worker, numbers: Sequence[int], changes: Sequence[Counts], plan: Plan, sequences: range
) -> Steps[dict[int, float], list[float]]:
    """Return the mean divergence over an excerpt of `plan` with each of some `changes` made to it.

    `numbers` are the places of those changes in `changes`, which all tasks share. The text passes through the blocks
    before a change once for all changes.
    """
    text, num_blocks = worker.kept.excerpts[sequences], worker.layout.num_blocks
    firsts = _first_blocks(worker, numbers, changes)
    begun = [number for number, first in firsts.items() if first < worker.blocks.start]  # changed in earlier shards
    passing = yield Passing([text.recordings] * (1 + len(begun)), {})
    recordings, means = passing.texts[0], dict(passing.state)
    changed_texts = dict(zip(begun, passing.texts[1:], strict=True))

    def pass_changed(number: int, recordings: list[Recording], *, first: int) -> None:
        """Pass one changed text through the rest of this shard."""
        changed_plan = replace(plan, removed={**plan.removed, **changes[number]})
        (changed_texts[number],) = pass_under_plans(worker, [recordings], [changed_plan], first=first)
        if worker.is_last:
            divergences = text.divergence(changed_texts.pop(number), worker.replica)
            means[number] = sum(divergences) / len(divergences)

    for number in begun:
        pass_changed(number, changed_texts[number], first=worker.blocks.start)
    for index in worker.replica.visited(worker.blocks):
        for number, first in firsts.items():
            if first == index:
                pass_changed(number, recordings, first=index)
        if index < max(firsts.values()):
            recordings, _ = worker.replica.run_with(index, recordings, candidate_weights(worker, index, plan))
    if worker.is_last:
        for number, first in firsts.items():
            if first == num_blocks:
                pass_changed(number, recordings, first=num_blocks)
    yield Passing([recordings, *(changed_texts[number] for number in numbers if number in changed_texts)], means)
    return [means[number] for number in numbers]


changed = ChainTask(_changed)


# -- rows


def _differences(worker: Worker, sequences: range, plan: Plan) -> Steps[RowSquares, RowSquares]:
    """Return, over some search sequences, each row's sum of squared differences of its output, dense and under `plan`.

    Both models run next to each other, each on its own text. Experts are left out: other tokens may reach them.
    """
    replica = worker.replica
    _, recordings = replica.start(worker.search_text.tokens[sequences.start : sequences.stop])
    passing = yield Passing([recordings, recordings], {})
    (dense, sparse), squares = passing.texts, dict(passing.state)
    for index in replica.visited(worker.blocks):
        specs = [spec for spec in worker.layout.blocks[index] if spec.expert is None]
        with replica.outputs(specs) as dense_outputs:
            dense, _ = replica.run(index, dense)
        with replica.outputs(specs) as sparse_outputs:
            sparse, _ = replica.run_with(index, sparse, candidate_weights(worker, index, plan))
        for spec in specs:
            pairs = zip(dense_outputs[spec.linear], sparse_outputs[spec.linear], strict=True)
            sums = [(one.float() - other.float()).square().flatten(0, -2).sum(dim=0) for one, other in pairs]
            squares[spec.linear] = torch.stack(sums).sum(dim=0).double().cpu()
    yield Passing([dense, sparse], squares)
    return squares


differences = ChainTask(_differences)


def _map_linears(
    worker: Worker, blocks: range, function: Callable[[RankedLinear], Any], plan: Plan, tokens: Tokens
) -> Steps[dict[Linear, Any], dict[Linear, Any]]:
    """Return `function` of each linear of a range of blocks, with the Gram of its inputs on the dense model."""
    passing = yield Passing([worker.replica.start(tokens)[1]], {})
    recordings, results = passing.texts[0], dict(passing.state)
    for index, after, statistics in dense_walk(worker, recordings, (Gram,), wanted=blocks):
        recordings = after
        for spec in worker.layout.blocks[index] if statistics else ():
            gram = inputs_of(worker, spec, statistics[0])
            assert isinstance(gram, Gram)
            linear = RankedLinear(
                spec=spec,
                weight=worker.replica.weight(spec),
                gram=gram.total,
                ranks=ranking(worker, index)[spec.linear],
                removed=plan.removed[spec.linear],
            )
            with worker.stopwatch.measure("rows"):
                results[spec.linear] = function(linear)
    yield Passing([recordings], results)
    return results


map_linears = ChainTask(_map_linears)


# -- blocks


def _measure(worker: Worker, block: int, function: Callable[[Sequence[LinearData]], Any]) -> Steps[list[Any], Any]:
    """Return `function` of the dense linears of one block and their inputs' statistics."""
    passing = yield Passing([], [])
    results = list(passing.state)
    if block in worker.blocks:
        with worker.replica.stream.resident(block):
            linears = [
                LinearData(
                    spec=spec,
                    weight=worker.replica.weight(spec),
                    inputs=inputs_of(worker, spec, worker.kept.statistics),
                )
                for spec in worker.layout.blocks[block]
            ]
            results.append(function(linears))
    yield Passing([], results)
    return results[0]


measure = ChainTask(_measure)


class BlockText:
    """One dense block with the search text that enters it (core/problem.py: BlockTask)."""

    def __init__(
        self,
        replica: Replica,
        index: int,
        inputs: Sequence[Recording],
        outputs: Sequence[Recording],
        ranks: Mapping[Linear, Int[Tensor, "rows columns"]],
    ) -> None:
        self.specs: Sequence[LinearSpec] = replica.layout.blocks[index]
        self.weights: Mapping[Linear, Tensor] = {spec.linear: replica.weight(spec) for spec in self.specs}
        self.ranks: Mapping[Linear, Tensor] = {spec.linear: ranks[spec.linear] for spec in self.specs}
        self.num_texts = len(inputs)
        self._replica, self._index, self._inputs, self._outputs = replica, index, inputs, outputs

    def dense_output(self, text: int) -> Float[Tensor, "sequences tokens features"]:
        """Return the block's output for chunk `text`."""
        return self._outputs[text].hidden

    def output(
        self, text: int, weights: Mapping[Linear, Float[Tensor, "rows columns"]]
    ) -> Float[Tensor, "sequences tokens features"]:
        """Return the same with other weights; differentiable in them."""
        return self._replica.differentiable(self._index, self._inputs[text], weights)


def _learn(worker: Worker, blocks: range, function: Callable[[BlockTask], Any]) -> Steps[list[Any], list[Any]]:
    """Return `function` of each block of a range, with the search text as it enters the block in the dense model."""
    passing = yield Passing([worker.search_text.recordings], [])
    recordings, results = passing.texts[0], list(passing.state)
    for index in worker.replica.visited(worker.blocks_until(blocks.stop)):
        outputs, _ = worker.replica.run(index, recordings)
        if index in blocks:
            results.append(function(BlockText(worker.replica, index, recordings, outputs, ranking(worker, index))))
        recordings = outputs
    yield Passing([recordings], results)
    return results


learn = ChainTask(_learn)
