"""Tasks that score candidates of a method that solves: candidates share the statistics and factors of each block."""

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
from neuronal_ray.workers.passes import dense_walk
from neuronal_ray.workers.pruned_blocks import factorized, solve_block
from neuronal_ray.workers.shard import ChainTask, Passing, gathered
from neuronal_ray.workers.solved_levels import LevelStore, solve_at_levels
from neuronal_ray.workers.tasks.candidates import end_trials, search_text_loss
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]
_Step = tuple[int, list[list[Recording]], list[list[dict[Group, Statistic]]]]


def _texts(worker: Worker, plans: Sequence[Plan], tokens: Tokens) -> list[list[Recording]]:
    """Return the calibration text, then the search text once for every plan."""
    return [worker.replica.start(tokens)[1], *(worker.search_text.recordings for _ in plans)]


def _solved_walk(
    worker: Worker, texts: list[list[Recording]], plans: Sequence[Plan], kinds: tuple[type[Statistic], ...]
) -> Iterator[_Step]:
    """Yield after each block its index, the texts, and the statistics of the search text under every plan.

    Statistics of the calibration text on the dense model are held for one block at a time.
    """
    assert worker.pruner.statistic is not None
    dense, *sparse = texts
    for index, after, (grams,) in dense_walk(worker, dense, (worker.pruner.statistic,)):
        factors = factorized(worker, index, grams)
        passed = [
            worker.replica.run_with(index, recordings, solve_block(worker, index, factors, plan), kinds)
            for plan, recordings in zip(plans, sparse, strict=True)
        ]
        sparse = [recordings for recordings, _ in passed]
        yield index, [after, *sparse], [observed for _, observed in passed]


# -- trials and losses


def _start_trials(
    worker: Worker, plans: Sequence[Plan], tokens: Tokens, *, divergence: bool = False
) -> Passing[list[Comparison]]:
    return Passing(_texts(worker, plans, tokens), [Comparison() for _ in plans])


def _pass_trials(
    worker: Worker,
    passing: Passing[list[Comparison]],
    plans: Sequence[Plan],
    tokens: Tokens,
    *,
    divergence: bool = False,
) -> Passing[list[Comparison]]:
    texts = passing.texts
    for index, after, observed in _solved_walk(worker, texts, plans, (SquareSum,)):
        texts = after
        for comparison, (sparse,) in zip(passing.state, observed, strict=True):
            comparison.add(worker.layout, index, worker.kept.dense_norms, sparse)
    return Passing(texts, passing.state)


def _end_trials(
    worker: Worker,
    passing: Passing[list[Comparison]],
    plans: Sequence[Plan],
    tokens: Tokens,
    *,
    divergence: bool = False,
) -> list[Trial]:
    return end_trials(worker, Passing(passing.texts[1:], passing.state), plans, divergence=divergence)


solved_trials = ChainTask("solved_trials", start=_start_trials, through=_pass_trials, end=_end_trials)
"""Return `trials` for a method that solves: statistics of `tokens` on the dense model, shared by all plans."""


def _start_losses(worker: Worker, plans: Sequence[Plan], tokens: Tokens) -> Passing[None]:
    return Passing(_texts(worker, plans, tokens), None)


def _pass_losses(worker: Worker, passing: Passing[None], plans: Sequence[Plan], tokens: Tokens) -> Passing[None]:
    texts = passing.texts
    for _, after, _ in _solved_walk(worker, texts, plans, ()):
        texts = after
    return Passing(texts, None)


def _end_losses(worker: Worker, passing: Passing[None], plans: Sequence[Plan], tokens: Tokens) -> list[float]:
    return [search_text_loss(worker, recordings) for recordings in passing.texts[1:]]


solved_losses = ChainTask("solved_losses", start=_start_losses, through=_pass_losses, end=_end_losses)
"""Return `losses` for a method that solves."""


# -- solved levels


def _start_levels(worker: Worker, blocks: range, levels: Sequence[int], tokens: Tokens) -> Passing[LevelStore]:
    return Passing([worker.replica.start(tokens)[1]], LevelStore(worker.pruner.levels))


def _solve_shard(
    worker: Worker, passing: Passing[LevelStore], blocks: range, levels: Sequence[int], tokens: Tokens
) -> Passing[LevelStore]:
    pruner, recordings, solved = worker.pruner, passing.texts[0], {}
    assert pruner.statistic is not None
    for index, after, statistics in dense_walk(worker, recordings, (pruner.statistic,), wanted=blocks):
        recordings = after
        if not statistics:
            continue
        factors = factorized(worker, index, statistics[0])
        with worker.stopwatch.measure("solving"):
            for spec in worker.layout.blocks[index]:
                weight, factor = worker.replica.weight(spec), factors[spec.reads]
                solved[spec.linear] = solve_at_levels(spec, weight, factor, pruner, levels)
    store = LevelStore(pruner.levels, solved).to(torch.device("cpu"))
    return Passing([recordings], passing.state.merge(store))


solve_levels = ChainTask("solve_levels", start=_start_levels, through=_solve_shard, end=gathered)
"""Return the linears of a range of blocks solved at each of `levels` on the dense model, on the host."""


def keep_levels(worker: Worker, store: LevelStore) -> None:
    """Put candidates together from these solutions from now on."""
    worker.kept.solved_levels = store.of(worker.blocks).to(worker.host)
