"""Tasks on the final model: settle its masks or weights, pass text through it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuronal_ray.core.layout import Linear
from neuronal_ray.core.masks import lowest_mask
from neuronal_ray.core.plan import Plan
from neuronal_ray.workers.passes import check_finite
from neuronal_ray.workers.pruned_blocks import final_block, on_host, pruned_block, ranking, refined_ranks
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]
Logits = Float[Tensor, "sequences length vocabulary"]


def unsettle(worker: Worker) -> None:
    """Read the final masks off the ranking again."""
    worker.kept.final_ranks, worker.kept.solved = {}, {}


def _settle(worker: Worker, plan: Plan, tokens: Tokens, walk: Walk) -> Steps[None, None]:
    """Settle the masks, or weights, of the final model under `plan`.

    `tokens` pass through the blocks one after the other, unless masks read off the ranking are final as they are.
    """
    kept, pruner = worker.kept, worker.pruner
    kept.final_ranks, kept.solved = dict(kept.ranks), {}
    if not (walk.pruned or pruner.walks):
        if pruner.refinement is not None:
            for index in worker.replica.visited(worker.blocks):
                refined = refined_ranks(worker, index, plan, ranking(worker, index), kept.statistics, kept.statistics)
                kept.final_ranks |= on_host(worker, refined)
        yield (yield Passing([], None))
        return
    passing = yield Passing([worker.replica.start(tokens, chunk=1 if walk.released else None)[1]], None)
    recordings, kinds = passing.texts[0], walk.kinds(pruner.final_statistics)
    for index in worker.replica.visited(worker.blocks):
        with worker.stopwatch.measure("dense pass"):
            outputs, observed = worker.replica.run(index, recordings, kinds)
        for statistics in observed:
            check_finite(statistics)
        weights, ranks = pruned_block(worker, index, plan, observed)
        kept.final_ranks |= on_host(worker, ranks)
        if pruner.solves:
            kept.solved |= {linear: weight.to(worker.host) for linear, weight in weights.items()}
        if walk.pruned:
            outputs, _ = worker.replica.run_with(index, recordings, weights)
        recordings = outputs
    yield Passing([recordings], None)


settle = ChainTask(_settle)


def _logits(
    worker: Worker, tokens: Tokens, plan: Plan | None, read: Callable[[Tokens, Iterator[Logits]], Any]
) -> Steps[None, Any]:
    """Return `read(tokens, chunks of logits)` for the final model under `plan`; None is the dense model."""
    chunks, recordings = worker.replica.start(tokens)
    passing = yield Passing([recordings], None)
    recordings = passing.texts[0]
    for index in worker.replica.visited(worker.blocks):
        if plan is None:
            recordings, _ = worker.replica.run(index, recordings)
        else:
            recordings, _ = worker.replica.run_with(index, recordings, final_block(worker, index, plan))
    yield Passing([recordings], None)
    return read(tokens, worker.replica.finish(chunks, recordings))


logits = ChainTask(_logits)


def logits_on_demand(worker: Worker, tokens: Tokens, plan: Plan | None) -> Logits:
    """Return the logits of text that comes up within a task of the last shard, such as a batch of a benchmark."""
    handover = None if worker.upstream is None else worker.upstream(logits, tokens.cpu(), plan, _joined)
    result = logits.run(worker, handover, tokens, plan, _joined)
    assert isinstance(result, Tensor), "the last shard has the result"
    return result


def _joined(tokens: Tokens, chunks: Iterator[Logits]) -> Logits:
    return torch.cat(list(chunks))


@contextmanager
def under_plan(worker: Worker, plan: Plan | None) -> Iterator[None]:
    """Put the weights of the final model in place of the dense ones; one more copy of the linears while it lasts."""
    with ExitStack() as stack:
        if plan is not None:
            for index in worker.replica.visited(worker.blocks):
                stack.enter_context(worker.replica.swapped(final_block(worker, index, plan, lasting=True)))
        yield


def mask(worker: Worker, linear: Linear, plan: Plan) -> Bool[Tensor, "rows columns"]:
    """Return the final mask of one linear under `plan`, True where weights go."""
    kept = worker.kept
    if kept.solved:
        return kept.solved[linear] == 0
    return lowest_mask((kept.final_ranks or ranking(worker, linear.block))[linear], plan.removed[linear])
