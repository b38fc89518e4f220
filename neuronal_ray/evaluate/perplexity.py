"""Perplexity by the protocol of the pruning papers: consecutive windows, exp of the mean of their mean losses."""

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.plan import Plan
from neuronal_ray.workers.footprint import CHUNKS_PER_TASK
from neuronal_ray.workers.pools.protocol import Pool, map_in_parallel
from neuronal_ray.workers.tasks.candidates import pass_together
from neuronal_ray.workers.tasks.final_model import logits
from neuronal_ray.workers.tasks.parallel import parallel_tasks
from neuronal_ray.workers.tasks.statistics import sequences_per_chunk


def window_losses(
    windows: Int64[Tensor, "windows length"],
    chunks: Iterator[Float[Tensor, "some length vocabulary"]],
    *,
    skip: int = 0,
) -> Float64[Tensor, " windows"]:
    """Return each window's mean cross-entropy over its length - 1 predictions, in nats, from float32 logits.

    The first `skip` of them do not count.
    """
    losses = []
    remaining = windows
    for chunk in chunks:
        inputs, remaining = remaining[: len(chunk)].to(chunk.device), remaining[len(chunk) :]
        for row, tokens in zip(chunk, inputs, strict=True):
            losses.append(F.cross_entropy(row[skip:-1].float(), tokens[skip + 1 :]))
    return torch.stack(losses).double().cpu()


def split_windows(
    windows: Int64[Tensor, "windows length"], *, chunk: int, most_chunks: int, workers: int
) -> list[Int64[Tensor, "some length"]]:
    """Split `windows` into tasks of whole chunks of `chunk` windows, at most `most_chunks` each.

    Chunks are never divided, so no bit depends on the number of tasks, which is such that all `workers` end together.
    """
    chunks = math.ceil(len(windows) / chunk)
    rounds = math.ceil(chunks / (workers * most_chunks))
    return list(windows.split(chunk * math.ceil(chunks / (workers * rounds))))


def _tasks(pool: Pool, windows: Int64[Tensor, "windows length"]) -> list[Int64[Tensor, "some length"]]:
    """Return the windows of each task.

    The chunks of a task share the cost of masking or transferring a block. A chain of shards that hold their blocks is
    busy in all of them only with many tasks under way: there a task has one chunk.
    """
    shared = pool.shards == 1 or pool.first(pass_together)
    return split_windows(
        windows,
        chunk=pool.first(sequences_per_chunk, windows.shape[1]),
        most_chunks=CHUNKS_PER_TASK if shared else 1,
        workers=pool.replicas * pool.first(parallel_tasks),
    )


def perplexity(
    pool: Pool,
    windows: Int64[Tensor, "windows length"],
    plan: Plan | None,
    *,
    skip: int = 0,
    progress: Progress | None = None,
    stage: str = "perplexity",
) -> float:
    """Return exp of the mean of the windows' losses of the model under `plan` (None: dense); infinite on overflow.

    The first `skip` predictions of each window do not count.

    The released codes multiply each window's mean over length - 1 predictions by length and divide by all tokens: the
    same number. Differs: they take losses from half-precision logits. Losses are merged in the order of the windows,
    so no bit depends on the pool.
    """
    tasks = _tasks(pool, windows)
    losses = []
    with (progress or Progress(quiet=True)).stage(stage, len(tasks)) as advance:
        for of_task in map_in_parallel(pool, logits, tasks, plan, partial(window_losses, skip=skip)):
            losses.append(of_task)
            advance("")
    mean = float(torch.cat(losses).mean())
    return math.exp(mean) if mean < 700 else math.inf
