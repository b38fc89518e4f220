"""Tasks that answer an allocation's queries about blocks, linears, rows and small changes (core/problem.py: Probe)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from neuronal_ray.core.layout import Linear, LinearSpec, Weighed
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.problem import BlockTask, RankedLinear
from neuronal_ray.core.stats import Gram
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.passes import dense_statistics, dense_walk, pass_under_plans
from neuronal_ray.workers.pruned_blocks import candidate_weights, inputs_of, ranking
from neuronal_ray.workers.replica import Replica
from neuronal_ray.workers.search_text import SearchText
from neuronal_ray.workers.shard import ChainTask, Passing, gathered, nothing
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]
RowSquares = dict[Linear, Float64[Tensor, " rows"]]


# -- small changes of a plan


def _start_excerpt(worker: Worker, sequences: range) -> Passing[None]:
    excerpt = SearchText(worker.replica, worker.search_text.tokens[sequences.start : sequences.stop])
    worker.kept.excerpts[sequences] = excerpt
    return Passing([excerpt.recordings], None)


def _pass_excerpt(worker: Worker, passing: Passing[None], sequences: range) -> Passing[None]:
    recordings, _ = dense_statistics(worker, passing.texts[0], ())
    worker.kept.excerpts[sequences].keep_dense_end(recordings if worker.is_last else ())
    return Passing([recordings], None)


set_excerpt = ChainTask("set_excerpt", start=_start_excerpt, through=_pass_excerpt, end=nothing)
"""Keep some of the search sequences as a text of their own, for `changed`."""


def _first_blocks(worker: Worker, numbers: Sequence[int], changes: Sequence[Counts]) -> dict[int, int]:
    """Return the first block that each change touches, the number of blocks for none, by the change's number."""
    last = worker.layout.num_blocks
    return {number: min((linear.block for linear in changes[number]), default=last) for number in numbers}


def _begun(worker: Worker, firsts: Mapping[int, int]) -> list[int]:
    """Return the numbers of the changes that touch a block of an earlier shard."""
    return [number for number, first in firsts.items() if first < worker.blocks.start]


def _start_changed(
    worker: Worker, numbers: Sequence[int], changes: Sequence[Counts], plan: Plan, sequences: range
) -> Passing[dict[int, float]]:
    begun = _begun(worker, _first_blocks(worker, numbers, changes))
    return Passing([worker.kept.excerpts[sequences].recordings] * (1 + len(begun)), {})


def _pass_changed(
    worker: Worker,
    passing: Passing[dict[int, float]],
    numbers: Sequence[int],
    changes: Sequence[Counts],
    plan: Plan,
    sequences: range,
) -> Passing[dict[int, float]]:
    text, num_blocks = worker.kept.excerpts[sequences], worker.layout.num_blocks
    firsts = _first_blocks(worker, numbers, changes)
    begun = _begun(worker, firsts)
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
    return Passing([recordings, *(changed_texts[number] for number in numbers if number in changed_texts)], means)


def _end_changed(
    worker: Worker,
    passing: Passing[dict[int, float]],
    numbers: Sequence[int],
    changes: Sequence[Counts],
    plan: Plan,
    sequences: range,
) -> list[float]:
    return [passing.state[number] for number in numbers]


changed = ChainTask("changed", start=_start_changed, through=_pass_changed, end=_end_changed)
"""Return the mean divergence over an excerpt of `plan` with each of some `changes` made to it.

`numbers` are the places of those changes in `changes`, which all tasks share. The text passes through the blocks before
a change once for all changes.
"""


# -- rows


def _start_differences(worker: Worker, sequences: range, plan: Plan) -> Passing[RowSquares]:
    _, recordings = worker.replica.start(worker.search_text.tokens[sequences.start : sequences.stop])
    return Passing([recordings, recordings], {})


def _pass_differences(
    worker: Worker, passing: Passing[RowSquares], sequences: range, plan: Plan
) -> Passing[RowSquares]:
    (dense, sparse), squares, replica = passing.texts, dict(passing.state), worker.replica
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
    return Passing([dense, sparse], squares)


differences = ChainTask("differences", start=_start_differences, through=_pass_differences, end=gathered)
"""Return, over some search sequences, each row's sum of squared differences of its output, dense and under `plan`.

Both models run next to each other, each on its own text. Experts are left out: other tokens may reach them.
"""


def _start_map(
    worker: Worker, blocks: range, function: Callable[[RankedLinear], Any], plan: Plan, tokens: Tokens
) -> Passing[dict[Linear, Any]]:
    return Passing([worker.replica.start(tokens)[1]], {})


def _map_shard(
    worker: Worker,
    passing: Passing[dict[Linear, Any]],
    blocks: range,
    function: Callable[[RankedLinear], Any],
    plan: Plan,
    tokens: Tokens,
) -> Passing[dict[Linear, Any]]:
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
    return Passing([recordings], results)


map_linears = ChainTask("map_linears", start=_start_map, through=_map_shard, end=gathered)
"""Return `function` of each linear of a range of blocks, with the Gram of its inputs on the dense model."""


# -- blocks


def _start_measuring(worker: Worker, block: int, function: Callable[[Sequence[Weighed]], Any]) -> Passing[list[Any]]:
    return Passing([], [])


def _measure_shard(
    worker: Worker, passing: Passing[list[Any]], block: int, function: Callable[[Sequence[Weighed]], Any]
) -> Passing[list[Any]]:
    if block not in worker.blocks:
        return passing
    with worker.replica.stream.resident(block):
        linears = [
            Weighed(
                spec=spec,
                weight=worker.replica.weight(spec),
                inputs=inputs_of(worker, spec, worker.kept.statistics),
            )
            for spec in worker.layout.blocks[block]
        ]
        return Passing([], [function(linears)])


def _end_measuring(
    worker: Worker, passing: Passing[list[Any]], block: int, function: Callable[[Sequence[Weighed]], Any]
) -> Any:
    (result,) = passing.state
    return result


measure = ChainTask("measure", start=_start_measuring, through=_measure_shard, end=_end_measuring)
"""Return `function` of the dense linears of one block and their inputs' statistics."""


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


def _start_learning(worker: Worker, blocks: range, function: Callable[[BlockTask], Any]) -> Passing[list[Any]]:
    return Passing([worker.search_text.recordings], [])


def _learn_shard(
    worker: Worker, passing: Passing[list[Any]], blocks: range, function: Callable[[BlockTask], Any]
) -> Passing[list[Any]]:
    recordings, results = passing.texts[0], list(passing.state)
    for index in worker.replica.visited(worker.blocks_until(blocks.stop)):
        outputs, _ = worker.replica.run(index, recordings)
        if index in blocks:
            results.append(function(BlockText(worker.replica, index, recordings, outputs, ranking(worker, index))))
        recordings = outputs
    return Passing([recordings], results)


learn = ChainTask("learn", start=_start_learning, through=_learn_shard, end=gathered)
"""Return `function` of each block of a range, with the search text as it enters the block in the dense model."""
