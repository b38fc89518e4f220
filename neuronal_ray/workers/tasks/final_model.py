"""Tasks on the final model: settle its masks or weights, pass text through it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from neuronal_ray.core.layout import Linear
from neuronal_ray.core.masks import cut
from neuronal_ray.core.plan import Plan
from neuronal_ray.workers.passes import check_finite
from neuronal_ray.workers.pruned_blocks import final_block, on_host, pruned_block, ranking, refined_ranks
from neuronal_ray.workers.shard import ChainTask, Passing, nothing
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]
Logits = Float[Tensor, "sequences length vocabulary"]


def unsettle(worker: Worker) -> None:
    """Read the final masks off the ranking again."""
    worker.kept.final_ranks, worker.kept.solved = {}, {}


# -- settle: masks, or weights, of the final model


def _needs_text(worker: Worker, walk: Walk) -> bool:
    """Tell whether text passes through the blocks to settle the model; a ranking on the dense model needs none."""
    return walk.pruned or worker.pruner.walks


def _start_settling(worker: Worker, plan: Plan, tokens: Tokens, walk: Walk) -> Passing[None]:
    worker.kept.final_ranks, worker.kept.solved = dict(worker.kept.ranks), {}
    if not _needs_text(worker, walk):
        return Passing([], None)
    return Passing([worker.replica.start(tokens, chunk=1 if walk.released else None)[1]], None)


def _settle_shard(worker: Worker, passing: Passing[None], plan: Plan, tokens: Tokens, walk: Walk) -> Passing[None]:
    kept, pruner = worker.kept, worker.pruner
    if not _needs_text(worker, walk):
        if pruner.refinement is not None:
            for index in worker.replica.visited(worker.blocks):
                refined = refined_ranks(worker, index, plan, ranking(worker, index), kept.statistics, kept.statistics)
                kept.final_ranks |= on_host(worker, refined)
        return passing
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
    return Passing([recordings], None)


settle = ChainTask("settle", start=_start_settling, through=_settle_shard, end=nothing)
"""Settle the masks, or weights, of the final model under `plan`.

`tokens` pass through the blocks one after the other, unless masks read off the ranking are final as they are.
"""


# -- text through the final model


def _start_logits(
    worker: Worker, tokens: Tokens, plan: Plan | None, read: Callable[[Tokens, Iterator[Logits]], Any]
) -> Passing[list[Tokens]]:
    chunks, recordings = worker.replica.start(tokens)
    return Passing([recordings], chunks)


def _pass_final(
    worker: Worker,
    passing: Passing[list[Tokens]],
    tokens: Tokens,
    plan: Plan | None,
    read: Callable[[Tokens, Iterator[Logits]], Any],
) -> Passing[list[Tokens]]:
    recordings = passing.texts[0]
    for index in worker.replica.visited(worker.blocks):
        if plan is None:
            recordings, _ = worker.replica.run(index, recordings)
        else:
            recordings, _ = worker.replica.run_with(index, recordings, final_block(worker, index, plan))
    return Passing([recordings], passing.state)


def _read_logits(
    worker: Worker,
    passing: Passing[list[Tokens]],
    tokens: Tokens,
    plan: Plan | None,
    read: Callable[[Tokens, Iterator[Logits]], Any],
) -> Any:
    return read(tokens, worker.replica.finish(passing.state, passing.texts[0]))


logits = ChainTask("logits", start=_start_logits, through=_pass_final, end=_read_logits)
"""Return `read(tokens, chunks of logits)` for the final model under `plan`; None is the dense model."""


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
    return cut((kept.final_ranks or ranking(worker, linear.block))[linear], plan.removed[linear])
