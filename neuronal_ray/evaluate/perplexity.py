"""Perplexity by the protocol of the pruning papers: consecutive windows, mean of the windows' mean losses."""

import math
from collections.abc import Iterator

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
    windows: Int64[Tensor, "windows length"], chunks: Iterator[Float[Tensor, "some length vocabulary"]]
) -> Float64[Tensor, " windows"]:
    """Return the mean cross-entropy, in nats, over the length - 1 predictions of each window, from float32 logits."""
    losses = []
    remaining = windows
    for chunk in chunks:
        part, remaining = remaining[: len(chunk)].to(chunk.device), remaining[len(chunk) :]
        for row, tokens in zip(chunk, part, strict=True):
            losses.append(F.cross_entropy(row[:-1].float(), tokens[1:]))
    return torch.stack(losses).double().cpu()


def split_windows(
    windows: Int64[Tensor, "windows length"], *, chunk: int, most_chunks: int, workers: int
) -> list[Int64[Tensor, "some length"]]:
    """Tasks of whole chunks of `chunk` windows, so that no bit depends on how many; of `most_chunks` at most, and as
    many as `workers` finish at the same time.
    """
    chunks = math.ceil(len(windows) / chunk)
    rounds = math.ceil(chunks / (workers * most_chunks))
    return list(windows.split(chunk * math.ceil(chunks / (workers * rounds))))


def _tasks(pool: Pool, windows: Int64[Tensor, "windows length"]) -> list[Int64[Tensor, "some length"]]:
    """Return the tasks of an evaluation.

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
    progress: Progress | None = None,
    stage: str = "perplexity",
) -> float:
    """exp of the mean of the windows' losses of the model under `plan` (None: dense); infinite on overflow.

    The originals multiply each window's mean over length - 1 predictions by length and divide by all tokens: the
    same number. Differs: their losses are taken from half-precision logits. Windows are merged in their order: the
    bits do not depend on the pool.
    """
    tasks = _tasks(pool, windows)
    losses = []
    with (progress or Progress(quiet=True)).stage(stage, len(tasks)) as advance:
        for some in map_in_parallel(pool, logits, tasks, plan, window_losses):
            losses.append(some)
            advance("")
    return _perplexity_of(torch.cat(losses))


def _perplexity_of(losses: Float64[Tensor, " windows"]) -> float:
    """exp of the mean; infinite on overflow."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf
