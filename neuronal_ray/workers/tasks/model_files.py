"""Tasks that write the final model's files, in the background where possible; each file lies within a shard."""

import os
import platform
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import Ranks
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.freed_memory import keep_freed_memory
from neuronal_ray.core.layout import Linear, LinearSpec
from neuronal_ray.core.masks import lowest_mask
from neuronal_ray.core.plan import Plan
from neuronal_ray.models.blocks import is_transposed
from neuronal_ray.models.output_files import OutputFile, stored_tensors
from neuronal_ray.models.tensor_copies import begin_output_file, copy_tensors, write_weights, zero_masked
from neuronal_ray.workers.pruned_blocks import ranking
from neuronal_ray.workers.replica import Replica, Stopped
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.worker import Worker


@dataclass(frozen=True, eq=False)
class _FinalWeights:
    """A snapshot of what `settle` left: solved weights, or the rankings of a block that masks are read off."""

    plan: Plan
    solved: Mapping[Linear, Tensor]
    ranks: Callable[[int], Mapping[Linear, Ranks]]

    @classmethod
    def of(cls, worker: Worker, plan: Plan) -> "_FinalWeights":
        """Take the snapshot; later changes of what the worker keeps do not reach it."""
        kept = worker.kept
        known = dict(kept.final_ranks or kept.ranks)
        return cls(plan, dict(kept.solved), partial(_known, known) if known else partial(ranking, worker))

    def of_linear(self, spec: LinearSpec) -> Tensor:
        """Return the solved weight of a linear, or its mask, True where weights go."""
        linear = spec.linear
        return (
            self.solved[linear]
            if self.solved
            else lowest_mask(self.ranks(linear.block)[linear], self.plan.removed[linear])
        )


def _known(ranks: Mapping[Linear, Ranks], block: int) -> Mapping[Linear, Ranks]:
    return ranks


def check_writable(worker: Worker, folder: Path) -> None:
    """Raise BadInput when the output directory cannot be written from this worker."""
    if not os.access(folder, os.W_OK):
        raise BadInput(
            f"--output: the worker on {platform.node()} cannot write to {folder.parent}; name a directory on "
            "storage that all nodes share"
        )


def write_ahead(worker: Worker, part: OutputFile, plan: Plan, target: Path) -> None:
    """Begin to `write` a file in the background of later tasks, from a snapshot of what is final now; see `written`.

    Not for offloaded blocks that are ranked at their turn: one block at a time is on the device.
    """
    kept = worker.kept
    if part.blocks.start in worker.blocks and (not worker.spec.offload or kept.solved or kept.final_ranks):
        final, queue = _FinalWeights.of(worker, plan), _device_queue(worker.device)
        worker.files.begin(part.file, lambda stop: _write_file(worker.replica, final, part, target, stop, queue=queue))


def written(worker: Worker, patience_s: float) -> dict[str, int | None]:
    """Return the zeros in each file that was begun ahead, None for one that is not done after `patience_s`."""
    return worker.files.results(patience_s)


def _write(worker: Worker, part: OutputFile, plan: Plan, target: Path) -> Steps[int, int]:
    """Write one file of the final model under `plan` into `target`; return the zeros among its linears' weights."""
    passing = yield Passing([], 0)
    zeros = passing.state
    if part.blocks.start in worker.blocks:
        zeros = _write_file(worker.replica, _FinalWeights.of(worker, plan), part, target, threading.Event())
    yield Passing([], zeros)
    return zeros


write = ChainTask(_write)


def _device_queue(device: torch.device) -> torch.cuda.Stream | None:
    """Return a CUDA stream that begins after the work already queued; None on a CPU."""
    if device.type != "cuda":
        return None
    queue = torch.cuda.Stream(device)
    queue.wait_stream(torch.cuda.current_stream(device))
    return queue


def _write_file(
    replica: Replica,
    final: _FinalWeights,
    part: OutputFile,
    target: Path,
    stop: threading.Event,
    *,
    queue: torch.cuda.Stream | None = None,
) -> int:
    assert part.blocks.stop <= replica.blocks.stop, "a file lies within a shard"
    try:
        with nullcontext() if queue is None else torch.cuda.stream(queue):
            return _write_tensors(replica, final, part, target, stop)
    except OSError as error:  # a full disk, for example
        raise OSError(f"{part.file}: {error}") from error


def _write_tensors(
    replica: Replica, final: _FinalWeights, part: OutputFile, target: Path, stop: threading.Event
) -> int:
    keep_freed_memory()  # for one mask after the other
    source = replica.checkpoint
    file = begin_output_file(source, part, target)
    put = write_weights if final.solved else zero_masked
    zeros, others = 0, dict.fromkeys(part.names)
    for block in part.blocks:
        if stop.is_set():
            raise Stopped
        values = {}
        for spec in replica.layout.blocks[block]:
            value = final.of_linear(spec)
            values[replica.name(spec)] = value.t() if is_transposed(replica.module(spec)) else value
        counted = put(source, file, stored_tensors(replica.stream.model, values))
        zeros += sum(counted.values())
        for name in counted:
            del others[source.stored_name(name)]
    copy_tensors(source, file, others)
    return zeros
