"""Do several shards, or blocks that visit the device, give what one worker gives: plans, scores, files, bit for bit?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import cpu_spec

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.options import parse_config
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.layout import Layout
from neuronal_ray.core.plan import exact_plan, uniform_rates
from neuronal_ray.evaluate.perplexity import perplexity
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.prune.compose import compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.files import begin_model, write_model
from neuronal_ray.prune.pipeline import plan_run
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.replica import shard_blocks
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.candidates import set_search_text, trials
from neuronal_ray.workers.tasks.final_model import mask
from neuronal_ray.workers.tasks.statistics import describe, keep_statistics, observe, rank
from neuronal_ray.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")

CheckpointDir = Callable[[str], Path]


def spec_of(path: Path, *, shards: int, offload: bool = False) -> WorkerSpec:
    return cpu_spec(path, compose(config_of("")).pruner, threads=None, shards=shards, offload=offload)


def config_of(arguments: str) -> PruneConfig:
    given = ["--model", "m", "--output", "o", "--search-samples", "3", *arguments.split()]
    return parse_config(PruneConfig, given, prog="test", description="")


def described(layout: Layout) -> list[tuple[object, ...]]:
    return [
        (
            spec.linear,
            spec.rows,
            spec.columns,
            spec.reads,
            spec.consumer,
            spec.sub_block,
            spec.expert,
            None if spec.sources is None else spec.sources.tolist(),
        )
        for spec in layout
    ]


@dataclass(frozen=True)
class Outcome:
    """All that a run gives."""

    digest: bytes
    scores: tuple[tuple[float, ...], ...]
    perplexities: tuple[float, ...]
    zeros: int
    tensors: dict[str, torch.Tensor]


def prune(path: Path, arguments: str, shards: int, target: Path, *, offload: bool = False) -> Outcome:
    config = config_of(arguments)
    composition, checkpoint = compose(config), open_checkpoint(path)
    text = torch.randint(3, 64, (6, 16), generator=torch.Generator().manual_seed(0))
    pool = InProcessPool(spec_of(path, shards=shards, offload=offload))
    session = Session(pool)
    allocation = plan_run(config, composition, session, text, Progress()).allocation
    session.settle(composition, allocation.plan, text, Progress())
    target.mkdir()
    parts = begin_model(checkpoint, pool, allocation.plan, target)
    zeros = write_model(checkpoint, pool, parts, allocation.plan, target, Progress())
    written = open_checkpoint(target)
    assert len(written.files) == shards
    assert set(written.tensors) == set(checkpoint.tensors)
    return Outcome(
        digest=allocation.plan.digest,
        scores=tuple(step.scores for step in allocation.steps),
        perplexities=tuple(perplexity(pool, text[:4], plan) for plan in (None, allocation.plan)),
        zeros=zeros,
        tensors={name: tensor for file in written.files for name, tensor in load_file(file).items()},
    )


@pytest.mark.parametrize(
    "arguments",
    [
        "--mode paper --block-lambdas 0.05,0.1,0.2 --row-lambdas 0,0.1",
        "--mode authors --block-lambdas 0.05,0.1 --row-lambdas 0,0.1",
        "--search-budget 50 --block-lambdas 0.05,0.2 --row-lambdas 0,0.1",
        "--method sparsegpt --mode paper --block-lambdas 0.05,0.1 --row-lambdas 0",
        "--method sparsegpt --search-budget 30 --block-lambdas 0.05,0.2",
        "--method wanda --allocation besa --set allocation.steps=2",
        "--method wanda --allocation owl --row-step trim",
        "--method wanda --allocation uniform --refinement dsnot",
        "--method magnitude --allocation atp --set allocation.max_candidates=3",
    ],
)
def test_shards_give_the_bits_of_one_worker(arguments: str, checkpoint_dir: CheckpointDir, tmp_path: Path) -> None:
    path = checkpoint_dir("llama")
    whole = prune(path, arguments, 1, tmp_path / "1")
    for shards, offload in ((1, True), (2, False), (2, True), (3, False)):
        parts = prune(path, arguments, shards, tmp_path / f"{shards} {offload}", offload=offload)
        assert (parts.digest, parts.scores, parts.perplexities, parts.zeros) == (
            whole.digest,
            whole.scores,
            whole.perplexities,
            whole.zeros,
        )
        assert parts.tensors.keys() == whole.tensors.keys()
        for name, tensor in whole.tensors.items():
            assert torch.equal(parts.tensors[name], tensor), name


def test_shards_of_every_family_find_the_layout_and_scores_of_the_whole(
    family: str, checkpoint_dir: CheckpointDir
) -> None:
    path = checkpoint_dir(family)
    whole, chain = InProcessPool(spec_of(path, shards=1)), InProcessPool(spec_of(path, shards=2, offload=True))
    layout = whole.first(describe)
    assert described(chain.first(describe)) == described(layout)
    text = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    config = config_of("--mode paper --block-lambdas 0.05,0.2 --row-lambdas 0,0.1")
    found = [plan_run(config, compose(config), Session(pool), text, Progress()).allocation for pool in (whole, chain)]
    assert found[0].plan.digest == found[1].plan.digest
    assert [step.scores for step in found[0].steps] == [step.scores for step in found[1].steps]
    assert perplexity(whole, text, found[0].plan) == perplexity(chain, text, found[0].plan)


def test_shards_of_mixtures_of_experts_are_those_of_the_whole(
    moe_family: str, checkpoint_dir: CheckpointDir, tmp_path: Path
) -> None:
    arguments = "--mode paper --block-lambdas 0.05,0.2 --row-lambdas 0"
    path = checkpoint_dir(moe_family)
    whole, parts = (prune(path, arguments, shards, tmp_path / str(shards), offload=shards == 2) for shards in (1, 2))
    assert (parts.digest, parts.scores, parts.zeros) == (whole.digest, whole.scores, whole.zeros)
    for name, tensor in whole.tensors.items():
        assert torch.equal(parts.tensors[name], tensor), name


def test_a_shard_holds_its_blocks_only(checkpoint_dir: CheckpointDir) -> None:
    path = checkpoint_dir("llama")
    sizes = []
    for shard in range(3):
        worker = Worker.build(WorkerSpec(**(vars(spec_of(path, shards=3)) | {"shard": shard})))
        assert worker.blocks == shard_blocks(3, shard, 3) == range(shard, shard + 1)
        blocks = worker.replica.stream.blocks
        assert [any(True for _ in block.parameters()) for block in blocks] == [at == shard for at in range(3)]
        sizes.append(sum(parameter.numel() for parameter in worker.replica.stream.model.parameters()))
    whole = Worker.build(spec_of(path, shards=1)).replica.stream.model
    block = sum(parameter.numel() for parameter in whole.base_model.layers[0].parameters())
    assert sizes == [sum(parameter.numel() for parameter in whole.parameters()) - 2 * block] * 3


def test_a_visiting_block_leaves_the_host_s_weights_alone(checkpoint_dir: CheckpointDir) -> None:
    worker = Worker.build(spec_of(checkpoint_dir("llama"), shards=1, offload=True))
    stream = worker.replica.stream
    weight = next(stream.blocks[1].parameters())
    host = weight.data_ptr()
    seen = []
    for index in worker.replica.visited(range(3)):
        seen.append(index)
        assert (weight.data_ptr() == host) == (index != 1)
        with stream.resident(0):
            assert (weight.data_ptr() == host) == (index != 1)
    assert seen == [0, 1, 2]
    assert weight.data_ptr() == host

    def fail() -> None:
        for _ in worker.replica.visited(range(1, 3)):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert weight.data_ptr() == host


def test_a_visiting_block_is_ranked_once_for_all_candidates_and_nothing_is_kept(
    checkpoint_dir: CheckpointDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[str] = []
    own = LinearPruner.ranked

    def counted(self: LinearPruner, *args: Any, **kwargs: Any) -> Any:
        ranked.append("one")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LinearPruner, "ranked", counted)
    path, text = checkpoint_dir("llama"), torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(1))
    workers = [Worker.build(spec_of(path, shards=1, offload=offload)) for offload in (False, True)]
    layout = workers[0].layout
    plans = [exact_plan(layout, uniform_rates(layout, lambda _, r=rate: r), target=rate) for rate in (0.4, 0.6, 0.8)]
    found = []
    for worker in workers:
        keep_statistics(worker, observe(worker, text))
        rank(worker)
        set_search_text(worker, text, chunk=None, with_reference=True)
        ranked.clear()
        tried = trials(worker, plans)
        again = len(ranked)
        found.append(
            ([trial.misalignment for trial in tried], [mask(worker, spec.linear, plans[1]) for spec in layout])
        )
        assert bool(worker.kept.ranks) != worker.spec.offload
        assert again == (sum(1 for _ in layout) if worker.spec.offload else 0)
        assert len(ranked) == 2 * again, "masks that follow each other share a block's ranking as well"
    assert found[0][0] == found[1][0]
    assert all(torch.equal(*pair) for pair in zip(found[0][1], found[1][1], strict=True))


def test_shards_are_contiguous_and_of_one_size_to_a_block() -> None:
    for num_blocks in range(1, 12):
        for shards in range(1, num_blocks + 1):
            ranges = [shard_blocks(num_blocks, shard, shards) for shard in range(shards)]
            assert [index for blocks in ranges for index in blocks] == list(range(num_blocks))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
