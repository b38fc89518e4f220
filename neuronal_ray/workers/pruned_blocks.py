"""What a worker makes of one block: rankings, masked weights, refined masks, solutions.

A sparse model is never stored. Its blocks get masked weights, read off the ranking under a plan, or solved weights, one
block after the other while text passes through.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import Ranks
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Group, Linear, LinearSpec
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import Statistic
from neuronal_ray.workers.comparison import merged
from neuronal_ray.workers.replica import Statistics, Weights
from neuronal_ray.workers.worker import Worker

FEW_TOKENS = 32
"""An expert that fewer tokens were routed to uses the merged statistics of all experts of its kind in its block."""


def candidate_weights(worker: Worker, index: int, plan: Plan) -> Weights:
    """Return a candidate's weights of block `index`, valid until the next call.

    They are masked by the ranking, or put together from solved levels where a solver has made them.
    """
    levels = worker.kept.solved_levels
    if levels is None:
        return masked_block(worker, index, plan, ranking(worker, index))
    with worker.stopwatch.measure("masks"):
        weights = levels.weights(worker.layout.blocks[index], plan, worker.replica.weight)
        return {linear: weight.to(worker.device) for linear, weight in weights.items()}


def masked_block(
    worker: Worker, index: int, plan: Plan, ranks: Mapping[Linear, Ranks], *, lasting: bool = False
) -> Weights:
    """Return the weights of block `index` masked by `ranks` under `plan`, see MaskedWeights.weights."""
    with worker.stopwatch.measure("masks"):
        return worker.masked_weights.weights(index, plan, ranks, lasting=lasting)


def final_block(worker: Worker, index: int, plan: Plan, *, lasting: bool = False) -> Weights:
    """Return the weights of block `index` in the final model under `plan`, as `settle` left it."""
    kept = worker.kept
    if kept.solved:
        return {spec.linear: kept.solved[spec.linear].to(worker.device) for spec in worker.layout.blocks[index]}
    return masked_block(worker, index, plan, kept.final_ranks or ranking(worker, index), lasting=lasting)


def ranking(worker: Worker, index: int) -> Mapping[Linear, Ranks]:
    """Return rankings on the device, those of block `index` among them.

    The ranking of an offloaded block is made, or copied from the host, once for all calls until another block's turn.
    """
    kept = worker.kept
    if not worker.spec.offload:
        return kept.ranks
    if kept.offloaded_ranks is None or kept.offloaded_ranks[0] != index:
        kept.offloaded_ranks = None  # to make room
        with worker.replica.stream.resident(index):
            ranks = {
                spec.linear: kept.ranks[spec.linear].to(worker.device)
                for spec in worker.layout.blocks[index]
                if spec.linear in kept.ranks
            }
            kept.offloaded_ranks = (index, ranks or rank_block(worker, index, kept.statistics))
    return kept.offloaded_ranks[1]


def rank_block(
    worker: Worker, index: int, statistics: Statistics | None, *, lower_ties_first: bool = True
) -> dict[Linear, Ranks]:
    """Return the ranking of each linear of block `index` by the method's score."""
    ranks = {}
    with worker.stopwatch.measure("ranking"):
        for spec in worker.layout.blocks[index]:
            with _naming(worker, spec.linear):
                ranks[spec.linear] = worker.pruner.ranked(
                    worker.replica.weight(spec), inputs_of(worker, spec, statistics), lower_ties_first=lower_ties_first
                )
    return ranks


def on_host(worker: Worker, ranks: Mapping[Linear, Ranks]) -> dict[Linear, Ranks]:
    """Return rankings where those are kept that cannot be made again."""
    return {linear: rank.to(worker.host) for linear, rank in ranks.items()}


def pruned_block(
    worker: Worker, index: int, plan: Plan, observed: Sequence[Statistics]
) -> tuple[Weights, Mapping[Linear, Ranks]]:
    """Return the weights of block `index` under `plan` by the statistics just observed, and the rankings used.

    Solved weights come without rankings. `observed` has the method's statistics first, the refinement's last.
    """
    if worker.pruner.solves:
        return solve_block(worker, index, factorized(worker, index, observed[0]), plan), {}
    statistics = observed[0] if observed else None
    ranks = rank_block(worker, index, statistics, lower_ties_first=plan.lower_ties_first)
    if worker.pruner.refinement is not None:
        ranks = refined_ranks(worker, index, plan, ranks, statistics, observed[-1])
    return masked_block(worker, index, plan, ranks), ranks


def refined_ranks(
    worker: Worker,
    index: int,
    plan: Plan,
    ranks: Mapping[Linear, Ranks],
    statistics: Statistics | None,
    moments: Statistics | None,
) -> dict[Linear, Ranks]:
    """Return rankings of block `index` that give the refined masks under `plan`."""
    refined = {}
    with worker.stopwatch.measure("refinement"):
        for spec in worker.layout.blocks[index]:
            inputs = inputs_of(worker, spec, moments)
            assert inputs is not None
            refined[spec.linear] = worker.pruner.refined(
                spec,
                worker.replica.weight(spec),
                ranks[spec.linear],
                plan.removed[spec.linear],
                inputs_of(worker, spec, statistics),
                inputs,
            )
    return refined


def factorized(worker: Worker, index: int, grams: Statistics) -> dict[Group, object]:
    """Return the solver's factor for each group of block `index`."""
    factors = {}
    with worker.stopwatch.measure("factorization"):
        for group, first in worker.layout.first_readers(index).items():
            inputs = inputs_of(worker, first, grams)
            assert inputs is not None
            with _naming(worker, first.linear):
                factors[group] = worker.pruner.factorized(inputs)
    return factors


def solve_block(worker: Worker, index: int, factors: Mapping[Group, object], plan: Plan) -> dict[Linear, Tensor]:
    """Return the solved weights of block `index` under `plan`."""
    with worker.stopwatch.measure("solving"):
        return {
            spec.linear: worker.pruner.solved(spec, worker.replica.weight(spec), factors[spec.reads], plan)
            for spec in worker.layout.blocks[index]
        }


def inputs_of(worker: Worker, spec: LinearSpec, statistics: Statistics | None) -> Statistic | None:
    """Return the statistic of a linear's inputs; an expert that saw fewer than FEW_TOKENS has that of its like."""
    if statistics is None:
        return None
    own = statistics.get(spec.reads)
    if spec.expert is None:
        assert own is not None, spec.linear
        return own
    if own is not None and own.tokens >= FEW_TOKENS:
        return own
    return merged(statistics, worker.layout.routed[spec.reads])


@contextmanager
def _naming(worker: Worker, linear: Linear) -> Iterator[None]:
    """Put the method and the linear in front of a method's BadInput."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"--method {worker.pruner.method}: {linear}: {error}") from error
