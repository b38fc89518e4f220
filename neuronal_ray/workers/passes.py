"""Text passing through the blocks of one shard: on the dense model, observed or not, and under plans."""

from collections.abc import Iterator, Mapping, Sequence

import torch

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Group
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import Statistic
from neuronal_ray.models.blocks import Recording
from neuronal_ray.workers.pruned_blocks import candidate_weights
from neuronal_ray.workers.worker import Worker


def dense_walk(
    worker: Worker, recordings: list[Recording], kinds: tuple[type[Statistic], ...], *, wanted: range | None = None
) -> Iterator[tuple[int, list[Recording], list[dict[Group, Statistic]]]]:
    """Yield, block after block of the dense model: its index, the text after it, the statistics of its inputs.

    With a range `wanted`, stop at its end and observe only its blocks.
    """
    blocks = worker.blocks if wanted is None else worker.blocks_until(wanted.stop)
    for index in worker.replica.visited(blocks):
        with worker.stopwatch.measure("dense pass"):
            recordings, observed = worker.replica.run(
                index, recordings, kinds if wanted is None or index in wanted else ()
            )
        for statistics in observed:
            check_finite(statistics)
        yield index, recordings, observed


def dense_statistics(
    worker: Worker, recordings: list[Recording], kinds: tuple[type[Statistic], ...]
) -> tuple[list[Recording], list[dict[Group, Statistic]]]:
    """Return the text after this shard's dense blocks and the statistics of their inputs, checked at the end."""
    gathered: list[dict[Group, Statistic]] = [{} for _ in kinds]
    with worker.stopwatch.measure("dense pass"):
        for index in worker.replica.visited(worker.blocks):
            recordings, observed = worker.replica.run(index, recordings, kinds)
            for known, statistics in zip(gathered, observed, strict=True):
                known |= statistics
    for known in gathered:
        check_finite(known)
    return recordings, gathered


def pass_under_plans(
    worker: Worker, texts: Sequence[list[Recording]], plans: Sequence[Plan], *, first: int | None = None
) -> list[list[Recording]]:
    """Return texts after this shard's last block, each under its plan, from block `first` (absent: the shard's) on.

    The texts pass each block together, so that an offloaded block comes to the device once.
    """
    passed = list(texts)
    for index in worker.replica.visited(range(worker.blocks.start if first is None else first, worker.blocks.stop)):
        for number, plan in enumerate(plans):
            passed[number], _ = worker.replica.run_with(index, passed[number], candidate_weights(worker, index, plan))
    return passed


def check_finite(statistics: Mapping[Group, Statistic]) -> None:
    """Raise BadInput naming the first block whose activations are not finite; wait for the device once."""
    finite = [torch.isfinite(statistic.norm).all() for statistic in statistics.values()]
    if not finite:
        return
    for group, is_finite in zip(statistics, torch.stack(finite).tolist(), strict=True):
        if not is_finite:
            raise BadInput(f"--model: NaN or infinite activations in block {group.block} of the dense model")
