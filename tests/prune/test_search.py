"""Are candidates, blocks and rows the same however many workers share them?"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import cpu_spec

from neuronal_ray.cli.options import parse_config
from neuronal_ray.cli.progress import Progress
from neuronal_ray.prune.compose import compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.pipeline import allocate
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.tasks.statistics import describe

pytestmark = pytest.mark.usefixtures("one_thread")


class Divided:
    """An in-process pool that says it has several workers: tasks are divided as for so many."""

    def __init__(self, pool: InProcessPool, replicas: int) -> None:
        self.pool, self.replicas, self.shards = pool, replicas, 1
        self.items: list[int] = []

    def map(
        self, task: Callable[..., object], items: Iterable[object], *args: object, **kwargs: object
    ) -> Iterator[object]:
        whole = list(items)
        self.items.append(len(whole))
        return self.pool.map(task, whole, *args, **kwargs)

    def each(self, task: Callable[..., object], *args: object, **kwargs: object) -> list[object]:
        return self.pool.each(task, *args, **kwargs)

    each_also = each

    def first(self, task: Callable[..., object], *args: object, **kwargs: object) -> object:
        return self.pool.first(task, *args, **kwargs)

    def begin(self) -> None:
        """See Pool."""

    def close(self) -> None:
        self.pool.close()


@pytest.mark.parametrize(
    "arguments",
    [
        "--method sparsegpt --allocation neuronal --block-lambdas 0.05,0.1,0.2",
        "--method sparsegpt --allocation atp --set allocation.max_candidates=5",
        "--method wanda --allocation besa --set allocation.steps=2",
        "--method wanda --allocation owl --row-step trim",
        "--search-budget 60 --block-lambdas 0.05,0.2 --row-lambdas 0,0.1",
        "--method sparsegpt --search-budget 50 --block-lambdas 0.05,0.2",
    ],
)
def test_plans_do_not_depend_on_the_number_of_workers(arguments: str, checkpoint_dir: Callable[[str], Path]) -> None:
    config = parse_config(
        PruneConfig,
        ["--model", "m", "--output", "o", "--search-samples", "2", *arguments.split()],
        prog="test",
        description="",
    )
    composition = compose(config)
    spec = cpu_spec(checkpoint_dir("llama"), composition.pruner, threads=None)
    text = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    digests, tasks = [], []
    for replicas in (1, 2, 3):
        pool = Divided(InProcessPool(spec), replicas)
        session = Session(pool)
        session.hold(composition, text, Progress(), samples=config.search_samples)
        layout = pool.first(describe)
        search = session.search(composition, text, Progress(), samples=config.search_samples, mode=config.mode)
        allocation = allocate(config, composition, layout, search)
        digests.append((allocation.plan.digest, [step.scores for step in allocation.steps]))
        tasks.append(pool.items[-1])
    assert digests[0] == digests[1] == digests[2]
    assert tasks == [1, 2, 3] or "--allocation" not in arguments  # the last of adaptive's questions has one task each
