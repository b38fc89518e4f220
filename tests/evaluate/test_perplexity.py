"""Are the tasks of an evaluation whole chunks, few and even, and its value independent of them?"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import cpu_spec

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.evaluate.perplexity import perplexity, split_windows, window_losses
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.replica import chunk_sequences
from neuronal_ray.workers.tasks.final_model import logits
from neuronal_ray.workers.worker import Worker


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 6), st.integers(1, 40))
def test_tasks_are_whole_chunks_and_as_many_as_the_workers_need(
    count: int, chunk: int, most_chunks: int, workers: int
) -> None:
    windows = torch.arange(count)[:, None]
    tasks = split_windows(windows, chunk=chunk, most_chunks=most_chunks, workers=workers)
    assert torch.equal(torch.cat(tasks), windows)
    assert all(len(task) % chunk == 0 for task in tasks[:-1])
    size = max(map(len, tasks))
    assert size <= chunk * most_chunks
    rounds = math.ceil(len(tasks) / workers)
    chunks = math.ceil(count / chunk)
    assert rounds == math.ceil(chunks / (workers * most_chunks)), "no more than the least"
    assert rounds * workers * (math.ceil(size / chunk) - 1) < chunks, "no larger than that many rounds need"


def test_the_value_does_not_depend_on_the_tasks(checkpoint_dir: Callable[[str], Path]) -> None:
    length = 24
    windows = torch.randint(
        3, 64, (chunk_sequences(length) * 9 + 5, length), generator=torch.Generator().manual_seed(0)
    )
    spec = cpu_spec(checkpoint_dir("llama"), LinearPruner())
    pool = InProcessPool(spec)
    found = perplexity(pool, windows, None)
    losses = logits(Worker.build(spec), windows, None, window_losses)
    assert found == math.exp(float(losses.mean()))
    pool.close()
