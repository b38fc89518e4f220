"""Tasks on the dense model: its layout, statistics of calibration text, and the ranking of its weights."""

import hashlib

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.memory import peak_bytes
from neuronal_ray.core.layout import Group, Layout
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.models.wiring import BlockKinds
from neuronal_ray.workers.passes import dense_statistics, dense_walk
from neuronal_ray.workers.pruned_blocks import on_host, rank_block
from neuronal_ray.workers.replica import Statistics, chunk_sequences
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.worker import Worker

Tokens = Int64[Tensor, "sequences length"]
Observed = list[dict[Group, Statistic]]


# -- the model and the device


def _trace(worker: Worker) -> Steps[BlockKinds, Layout]:
    """Find the layout of the model; each shard adds the kinds of blocks that it has."""
    passing = yield Passing([], BlockKinds())
    yield Passing([], worker.replica.trace(passing.state))
    return worker.layout


trace = ChainTask(_trace)


def keep_layout(worker: Worker, layout: Layout) -> None:
    """Keep the layout that `trace` found in the last shard."""
    worker.replica.keep_layout(layout)


def describe(worker: Worker) -> Layout:
    """Return the layout of the model."""
    return worker.layout


def device_name(worker: Worker) -> str:
    """Return the name of the device, for the report."""
    if worker.device.type == "cuda":
        return torch.cuda.get_device_name(worker.device)
    return f"cpu, {torch.get_num_threads()} threads"


def peak_memory(worker: Worker) -> int:
    """Return the most bytes that were allocated on a GPU, or that this process was resident in."""
    if worker.device.type == "cuda":
        return torch.cuda.max_memory_allocated(worker.device)
    return peak_bytes()


def sequences_per_chunk(worker: Worker, length: int) -> int:
    """Return the number of sequences of `length` tokens that pass through a block at once on this device."""
    return chunk_sequences(length, worker.device.type)


def fingerprint(worker: Worker) -> str:
    """Return a digest that is equal for equal checkpoints and dtypes, as far as file headers and times can tell."""
    checkpoint = worker.replica.checkpoint
    sha = hashlib.sha256((checkpoint.path / "config.json").read_bytes())
    for name, stored in sorted(checkpoint.tensors.items()):
        place = (name, stored.start, stored.stop, stored.dtype, stored.path.name, stored.path.stat().st_mtime_ns)
        sha.update(repr(place).encode())
    return f"{sha.hexdigest()} {worker.replica.stream.model.dtype}"


def use_pruner(worker: Worker, pruner: LinearPruner) -> None:
    """Choose weights by `pruner` from now on; drop the rankings and what was made of them."""
    kept = worker.kept
    kept.pruner, kept.ranks, kept.offloaded_ranks, kept.solved_levels = pruner, {}, None, None
    kept.final_ranks, kept.solved = {}, {}


# -- statistics


def _observe_all(worker: Worker, tokens: Tokens, kinds: tuple[type[Statistic], ...]) -> Steps[Observed, Observed]:
    """Return statistics of one chunk of calibration text on the dense model, on the host: one mapping for each kind."""
    passing = yield Passing([worker.replica.start(tokens)[1]], [{} for _ in kinds])
    recordings, statistics = dense_statistics(worker, passing.texts[0], kinds)
    host = torch.device("cpu")
    for known, seen in zip(passing.state, statistics, strict=True):
        known |= {group: statistic.to(host) for group, statistic in seen.items()}
    yield Passing([recordings], passing.state)
    return passing.state


observe_all = ChainTask(_observe_all)


def observe(worker: Worker, tokens: Tokens, kind: type[Statistic] = SquareSum) -> Statistics:
    """Return `observe_all` of one kind, on a worker that holds the whole model."""
    (statistics,) = observe_all(worker, tokens, (kind,))
    return statistics


def keep_statistics(worker: Worker, statistics: Statistics) -> None:
    """Keep the statistics of the whole calibration text on the dense model."""
    worker.kept.statistics, worker.kept.offloaded_ranks = worker.on_device(statistics), None


# -- ranking


def rank(worker: Worker) -> None:
    """Rank the rows of every linear once, by the method's score on the statistics that are kept.

    Offloaded blocks are ranked at their turn: a GPU sorts their rows in less time than rankings take to be copied.
    """
    if worker.spec.offload:
        return
    for index in worker.blocks:
        worker.kept.ranks |= rank_block(worker, index, worker.kept.statistics)


def _rank_on_walk(worker: Worker, tokens: Tokens) -> Steps[None, None]:
    """Rank every linear by statistics that are held for one block at a time, on the dense model."""
    assert worker.pruner.statistic is not None
    passing = yield Passing([worker.replica.start(tokens)[1]], None)
    recordings = passing.texts[0]
    for index, after, (statistics,) in dense_walk(worker, recordings, (worker.pruner.statistic,)):
        worker.kept.ranks |= on_host(worker, rank_block(worker, index, statistics))
        recordings = after
    yield Passing([recordings], None)


rank_on_walk = ChainTask(_rank_on_walk)
