"""Perplexity by the protocol of the pruning papers: consecutive windows, mean of the windows' mean losses."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from neuronal_ray.core.plan import Plan
from neuronal_ray.pool import Pool, map_side_by_side
from neuronal_ray.replica import chunk_sequences
from neuronal_ray.worker import Worker

_CHUNKS_PER_TASK = 4


def window_losses(
    worker: Worker, windows: Int64[Tensor, "windows length"], plan: Plan | None
) -> Float64[Tensor, " windows"]:
    """Mean cross-entropy, in nats, over the length - 1 predictions of each window; logits taken to float32."""
    return worker.logits(windows, plan, partial(_losses, windows))


def _losses(
    windows: Int64[Tensor, "windows length"], chunks: Iterator[Float[Tensor, "some length vocabulary"]]
) -> Float64[Tensor, " windows"]:
    losses = []
    remaining = windows
    for logits in chunks:
        part, remaining = remaining[: len(logits)].to(logits.device), remaining[len(logits) :]
        for row, tokens in zip(logits, part, strict=True):
            losses.append(F.cross_entropy(row[:-1].float(), tokens[1:]))
    return torch.stack(losses).double().cpu()


def split_windows(windows: Int64[Tensor, "windows length"]) -> list[Int64[Tensor, "some length"]]:
    """Tasks of a size that does not depend on the pool."""
    return list(windows.split(_CHUNKS_PER_TASK * chunk_sequences(windows.shape[1])))


def perplexity(
    pool: Pool,
    windows: Int64[Tensor, "windows length"],
    plan: Plan | None,
    *,
    advance: Callable[[str], None] = lambda _: None,
) -> float:
    """exp of the mean of the windows' losses of the model under `plan` (None: dense); infinite on overflow.

    The originals multiply each window's mean over length - 1 predictions by length and divide by all tokens: the
    same number. Differs: their losses are taken from half-precision logits.
    """
    losses = []
    for part in map_side_by_side(pool, window_losses, split_windows(windows), plan):
        losses.append(part)
        advance("")
    return perplexity_of(torch.cat(losses))


def perplexity_of(losses: Float64[Tensor, " windows"]) -> float:
    """exp of the mean; infinite on overflow."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf
