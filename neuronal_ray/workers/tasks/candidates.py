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
from neuronal_ray.workers.shard import ChainTask, Passing, nothing
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]


def pass_together(worker: Worker) -> bool:
    """Tell whether candidates should come in groups that pass each block together: where blocks are offloaded."""
    return worker.spec.offload


# -- the search text


def _start_search_text(
    worker: Worker, tokens: Tokens, reference: Statistics | None = None, *, chunk: int | None, with_reference: bool
) -> Passing[None]:
    kept = worker.kept
    kept.search_text, kept.excerpts = SearchText(worker.replica, tokens, chunk=chunk), {}
    kept.solved_levels = None
    kept.dense_norms = {} if reference is None else worker.on_device(reference)
    return Passing([worker.search_text.recordings] if with_reference and reference is None else [], None)


def _observe_search_text(
    worker: Worker,
    passing: Passing[None],
    tokens: Tokens,
    reference: Statistics | None = None,
    *,
    chunk: int | None,
    with_reference: bool,
) -> Passing[None]:
    if not passing.texts:
        return passing
    recordings, (worker.kept.dense_norms,) = dense_statistics(worker, passing.texts[0], (SquareSum,))
    worker.search_text.keep_dense_end(recordings if worker.is_last else ())
    return Passing([recordings], None)


set_search_text = ChainTask("set_search_text", start=_start_search_text, through=_observe_search_text, end=nothing)
"""Keep the search text's embeddings; `with_reference`, also the dense model's activation norms (A_D) and last states.

`reference`: the norms, where they are known already and all that is needed. Solved levels are dropped.
"""


# -- alignment with the dense model's own activations (Algorithm 1)


def _start_trials(worker: Worker, plans: Sequence[Plan], *, divergence: bool = False) -> Passing[list[Comparison]]:
    return Passing([worker.search_text.recordings] * len(plans), [Comparison() for _ in plans])


def _pass_trials(
    worker: Worker, passing: Passing[list[Comparison]], plans: Sequence[Plan], *, divergence: bool = False
) -> Passing[list[Comparison]]:
    texts = list(passing.texts)
    for index in worker.replica.visited(worker.blocks):
        last = index == worker.layout.num_blocks - 1 and not divergence
        with worker.replica.without_output(index) if last else nullcontext():
            for number, (plan, comparison) in enumerate(zip(plans, passing.state, strict=True)):
                weights = candidate_weights(worker, index, plan)
                texts[number], (observed,) = worker.replica.run_with(index, texts[number], weights, (SquareSum,))
                comparison.add(worker.layout, index, worker.kept.dense_norms, observed)
    return Passing(texts, passing.state)


def end_trials(
    worker: Worker, passing: Passing[list[Comparison]], plans: Sequence[Plan], *, divergence: bool = False
) -> list[Trial]:
    """Return the trial of each plan."""
    return [
        comparison.trial(worker.search_text.divergence(text, worker.replica) if divergence else ())
        for comparison, text in zip(passing.state, passing.texts, strict=True)
    ]


trials = ChainTask("trials", start=_start_trials, through=_pass_trials, end=end_trials)
"""Return the alignment of the model under each plan with the dense model (Algorithm 1).

The texts of all plans pass each block together. With `divergence`, a trial also has the KL divergence of its
next-token distributions from the dense model's.
"""


def trial(worker: Worker, plan: Plan, *, divergence: bool = False) -> Trial:
    """Return `trials` of one plan, on a worker that holds the whole model."""
    (result,) = trials(worker, [plan], divergence=divergence)
    return result


# -- cross-entropy and divergence


def _start_plans(worker: Worker, plans: Sequence[Plan]) -> Passing[None]:
    return Passing([worker.search_text.recordings] * len(plans), None)


def _pass_plans(worker: Worker, passing: Passing[None], plans: Sequence[Plan]) -> Passing[None]:
    return Passing(pass_under_plans(worker, passing.texts, plans), None)


def _end_losses(worker: Worker, passing: Passing[None], plans: Sequence[Plan]) -> list[float]:
    return [search_text_loss(worker, text) for text in passing.texts]


def _end_divergences(worker: Worker, passing: Passing[None], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
    return [worker.search_text.divergence(text, worker.replica) for text in passing.texts]


losses = ChainTask("losses", start=_start_plans, through=_pass_plans, end=_end_losses)
"""Return the mean cross-entropy of the search text under each plan, nats per predicted token."""

divergences = ChainTask("divergences", start=_start_plans, through=_pass_plans, end=_end_divergences)
"""Return, for each plan, each search sequence's mean KL divergence of next-token distributions, nats a token."""


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


def _start_local_trial(worker: Worker, plan: Plan) -> Passing[Comparison]:
    return Passing([worker.search_text.recordings], Comparison(dead_is_infinite=True))


def _pass_local_trial(worker: Worker, passing: Passing[Comparison], plan: Plan) -> Passing[Comparison]:
    kind = RunningGram if worker.pruner.solves else RunningNorm
    recordings = passing.texts[0]
    for index in worker.replica.visited(worker.blocks):
        with worker.stopwatch.measure("dense pass"):
            _, (reference,) = worker.replica.run(index, recordings, (kind,))
        weights, _ = pruned_block(worker, index, plan, [reference])
        recordings, (observed,) = worker.replica.run_with(index, recordings, weights, (kind,))
        passing.state.add(worker.layout, index, reference, observed)
    return Passing([recordings], passing.state)


def _end_local_trial(worker: Worker, passing: Passing[Comparison], plan: Plan) -> Trial:
    return passing.state.trial()


local_trial = ChainTask("local_trial", start=_start_local_trial, through=_pass_local_trial, end=_end_local_trial)
"""Return the alignment block by block with dense weights on the sparse stream, ranking anew (released code)."""
