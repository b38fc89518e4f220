"""Tasks that score candidates: the search text under plans, compared with the dense model."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch.nn.functional as F
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import RunningGram, RunningNorm, SquareSum
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.comparison import Comparison
from neuronal_ray.workers.passes import dense_statistics, pass_under_plans
from neuronal_ray.workers.pruned_blocks import candidate_weights, pruned_block
from neuronal_ray.workers.replica import Statistics
from neuronal_ray.workers.search_text import SearchText
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]


def pass_together(worker: Worker) -> bool:
    """Tell whether candidates should come in groups that pass each block together: where blocks are offloaded."""
    return worker.spec.offload


# -- the search text


def _set_search_text(
    worker: Worker, tokens: Tokens, reference: Statistics | None = None, *, chunk: int | None, with_reference: bool
) -> Steps[None, None]:
    """Keep the search text's embeddings and, `with_reference`, what the dense model makes of it.

    That is its activation norms (A_D) and, in the last shard, its last hidden states.
    `reference`: the norms, where they are known already and all that is needed. Solved levels are dropped.
    """
    kept, needs_pass = worker.kept, with_reference and reference is None
    kept.search_text, kept.excerpts = SearchText(worker.replica, tokens, chunk=chunk), {}
    kept.solved_levels = None
    kept.dense_norms = {} if reference is None else worker.on_device(reference)
    passing = yield Passing([worker.search_text.recordings] if needs_pass else [], None)
    texts = passing.texts
    if needs_pass:
        recordings, (kept.dense_norms,) = dense_statistics(worker, texts[0], (SquareSum,))
        worker.search_text.keep_dense_end(recordings if worker.is_last else ())
        texts = [recordings]
    yield Passing(texts, None)


set_search_text = ChainTask(_set_search_text)


# -- alignment with the dense model's own activations (Algorithm 1)


def _trials(worker: Worker, plans: Sequence[Plan], *, divergence: bool = False) -> Steps[list[Comparison], list[Trial]]:
    """Return the alignment of the model under each plan with the dense model (Algorithm 1).

    The texts of all plans pass each block together. With `divergence`, a trial also has the KL divergence of its
    next-token distributions from the dense model's.
    """
    passing = yield Passing([worker.search_text.recordings] * len(plans), [Comparison() for _ in plans])
    texts, comparisons = list(passing.texts), passing.state
    for index in worker.replica.visited(worker.blocks):
        last = index == worker.layout.num_blocks - 1 and not divergence
        with worker.replica.without_output(index) if last else nullcontext():
            for number, (plan, comparison) in enumerate(zip(plans, comparisons, strict=True)):
                weights = candidate_weights(worker, index, plan)
                texts[number], (observed,) = worker.replica.run_with(index, texts[number], weights, (SquareSum,))
                comparison.add(worker.layout, index, worker.kept.dense_norms, observed)
    yield Passing(texts, comparisons)
    return ended_trials(worker, comparisons, texts, divergence=divergence)


def ended_trials(
    worker: Worker, comparisons: Sequence[Comparison], texts: Sequence[list[Recording]], *, divergence: bool
) -> list[Trial]:
    """Return the trial of each text that has passed the last block."""
    return [
        comparison.trial(worker.search_text.divergence(text, worker.replica) if divergence else ())
        for comparison, text in zip(comparisons, texts, strict=True)
    ]


trials = ChainTask(_trials)


def trial(worker: Worker, plan: Plan, *, divergence: bool = False) -> Trial:
    """Return `trials` of one plan, on a worker that holds the whole model."""
    (result,) = trials(worker, [plan], divergence=divergence)
    return result


# -- cross-entropy and divergence


def _losses(worker: Worker, plans: Sequence[Plan]) -> Steps[None, list[float]]:
    """Return the mean cross-entropy of the search text under each plan, nats per predicted token."""
    passing = yield Passing([worker.search_text.recordings] * len(plans), None)
    texts = pass_under_plans(worker, passing.texts, plans)
    yield Passing(texts, None)
    return [search_text_loss(worker, text) for text in texts]


def _divergences(worker: Worker, plans: Sequence[Plan]) -> Steps[None, list[tuple[float, ...]]]:
    """Return, for each plan, each search sequence's mean KL divergence of next-token distributions, nats a token."""
    passing = yield Passing([worker.search_text.recordings] * len(plans), None)
    texts = pass_under_plans(worker, passing.texts, plans)
    yield Passing(texts, None)
    return [worker.search_text.divergence(text, worker.replica) for text in texts]


losses, divergences = ChainTask(_losses), ChainTask(_divergences)


def search_text_loss(worker: Worker, recordings: list[Recording]) -> float:
    """Return the mean cross-entropy of the search text per predicted token, infinite on overflow."""
    total, count = 0.0, 0
    chunks = worker.search_text.chunks
    texts = (row for tokens in chunks for row in tokens)
    rows = (row for logits in worker.replica.finish(chunks, recordings) for row in logits)
    for row, targets in zip(rows, texts, strict=True):
        total += float(F.cross_entropy(row[:-1].float(), targets[1:], reduction="sum"))
        count += len(targets) - 1
    return total / count if math.isfinite(total) else math.inf


# -- the released code's criterion


def _local_trial(worker: Worker, plan: Plan) -> Steps[Comparison, Trial]:
    """Return the alignment block by block with dense weights on the sparse stream, ranking anew (released code)."""
    kind = RunningGram if worker.pruner.solves else RunningNorm
    passing = yield Passing([worker.search_text.recordings], Comparison(dead_is_infinite=True))
    recordings, comparison = passing.texts[0], passing.state
    for index in worker.replica.visited(worker.blocks):
        with worker.stopwatch.measure("dense pass"):
            _, (reference,) = worker.replica.run(index, recordings, (kind,))
        weights, _ = pruned_block(worker, index, plan, [reference])
        recordings, (observed,) = worker.replica.run_with(index, recordings, weights, (kind,))
        comparison.add(worker.layout, index, reference, observed)
    yield Passing([recordings], comparison)
    return comparison.trial()


local_trial = ChainTask(_local_trial)
