"""Tasks in parallel on thread lanes give the bits of tasks one after the other."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import cpu_spec

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.core.plan import Plan, exact_plan, uniform_rates
from neuronal_ray.core.stats import SquareSum
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.pools.protocol import map_in_parallel
from neuronal_ray.workers.replica import Replica
from neuronal_ray.workers.shard import Timed
from neuronal_ray.workers.tasks.candidates import divergences, local_trial, losses, set_search_text, trial, trials
from neuronal_ray.workers.tasks.final_model import mask
from neuronal_ray.workers.tasks.parallel import InParallel, parallel_tasks
from neuronal_ray.workers.tasks.statistics import keep_statistics, observe, observe_all, rank
from neuronal_ray.workers.thread_lanes import lane_count
from neuronal_ray.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "opt", "gpt2", "gemma2", "mixtral", "deepseek_v3"]
TEXT = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(2))


def worker_of(path: Path, *, threads: int = 3, chunk: int = 2) -> Worker:
    spec = cpu_spec(path, LinearPruner(method="wanda"), threads=threads)
    worker = Worker.build(spec)
    keep_statistics(worker, observe(worker, TEXT))
    rank(worker)
    set_search_text(worker, TEXT, chunk=chunk, with_reference=True)
    return worker


def plans_of(worker: Worker, *rates: float) -> list[Plan]:
    layout = worker.layout
    return [exact_plan(layout, uniform_rates(layout, lambda _, rate=rate: rate), target=rate) for rate in rates]


@given(st.integers(1, 256), st.integers(0, 2**36))
def test_lanes_share_the_threads_evenly_and_are_few(threads: int, block_bytes: int) -> None:
    count = lane_count(threads, block_bytes)
    assert threads % count == 0
    assert 1 <= count <= 8
    assert count == 1 or count * block_bytes <= 2**30


@pytest.mark.parametrize("family", FAMILIES)
def test_a_twin_has_the_same_memory_and_takes_weights_of_its_own(
    family: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    replica = Replica.load(checkpoint_dir(family), device="cpu", dtype="float32", trust_remote_code=False)
    twin = replica.twin(threading.Event())
    ours, theirs = (dict(one.stream.model.named_parameters()) for one in (replica, twin))
    assert {name: tensor.data_ptr() for name, tensor in ours.items()} == {
        name: tensor.data_ptr() for name, tensor in theirs.items()
    }
    specs = replica.layout.blocks[1]
    assert all(replica.weight(spec).data_ptr() == twin.weight(spec).data_ptr() for spec in specs)
    assert not any(replica.module(spec) is twin.module(spec) for spec in specs)

    _, recordings = replica.start(TEXT)
    dense, _ = replica.run(1, recordings)
    zeros = {spec.linear: torch.zeros_like(replica.weight(spec)) for spec in specs}
    with twin.swapped(zeros):
        emptied, _ = twin.run(1, recordings)
        beside, _ = replica.run(1, recordings)
    assert torch.equal(beside[0].hidden, dense[0].hidden)
    assert not torch.equal(emptied[0].hidden, dense[0].hidden)
    again, _ = twin.run(1, recordings)
    assert torch.equal(again[0].hidden, dense[0].hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks_in_parallel_give_the_bits_of_one_after_the_other(
    family: str, checkpoint_dir: Callable[[str], Path]
) -> None:
    worker = worker_of(checkpoint_dir(family))
    assert parallel_tasks(worker) == 3
    plans = plans_of(worker, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
    in_parallel = InParallel(trial)(worker, plans)
    parallel_divergences = InParallel(divergences)(worker, [[plan] for plan in plans])
    parallel_losses = InParallel(losses)(worker, [[plan] for plan in plans])
    parts = list(TEXT.split(1))
    observed = InParallel(observe_all)(worker, parts, (SquareSum,))

    torch.set_num_threads(1)  # as many as in a lane
    for plan, found in zip(plans, in_parallel, strict=True):
        alone = trial(worker, plan)
        assert found.misalignment == alone.misalignment
        assert found.signals.keys() == alone.signals.keys()
        assert all(torch.equal(found.signals[group], signal) for group, signal in alone.signals.items())
    assert len({found.misalignment for found in in_parallel}) == len(plans)
    assert parallel_divergences == [divergences(worker, [plan]) for plan in plans]
    assert parallel_losses == [losses(worker, [plan]) for plan in plans]
    for (found,), part in zip(observed, parts, strict=True):
        (alone,) = observe_all(worker, part, (SquareSum,))
        assert all(torch.equal(found[group].norm, statistic.norm) for group, statistic in alone.items())


def test_the_released_order_leaves_nothing_behind(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_of(checkpoint_dir("llama"), chunk=1)
    plans = plans_of(worker, 0.3, 0.5, 0.7)
    (linear, *_) = plans[0].removed
    before = mask(worker, linear, plans[0])
    found = [found.misalignment for found in InParallel(local_trial)(worker, plans)]
    assert found == [local_trial(worker, plan).misalignment for plan in plans]
    assert torch.equal(mask(worker, linear, plans[0]), before)


def test_what_passed_the_lanes_is_counted(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_of(checkpoint_dir("llama"))
    plans = plans_of(worker, 0.3, 0.5, 0.7)
    before, seconds = worker.replica.tokens, worker.stopwatch.seconds["sparse forwards"]
    InParallel(trial)(worker, plans)
    assert worker.replica.tokens - before == len(plans) * worker.layout.num_blocks * TEXT.numel()
    assert worker.stopwatch.seconds["sparse forwards"] > seconds
    _, alone_s = Timed(trials)(worker, plans[:1])
    shares = [spent for _, spent in InParallel(_timed_trials)(worker, [[plan] for plan in plans])]
    assert all(0 < spent < 1000 * alone_s for spent in shares)


def _timed_trials(worker: Worker, plans: list[Plan]) -> tuple[object, float]:
    assert worker.stopwatch is worker.replica.stopwatch
    return Timed(trials)(worker, plans)


def _threads_in(worker: Worker, item: int) -> int:
    return torch.get_num_threads()


def _stumbles(worker: Worker, item: int) -> int:
    if item == 2:
        raise ValueError("--flag: 2 is refused")
    return item


def test_threads_are_shared_and_given_back(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_of(checkpoint_dir("llama"), threads=2)
    assert InParallel(_threads_in)(worker, [0, 1, 2, 3]) == [1, 1, 1, 1]
    assert InParallel(_threads_in)(worker, [0]) == [1], "the same numbers, whatever runs in parallel"
    assert torch.get_num_threads() == 2


def test_an_error_is_raised_and_lanes_go_on(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_of(checkpoint_dir("llama"))
    for _ in range(3):
        with pytest.raises(ValueError, match="2 is refused"):
            InParallel(_stumbles)(worker, [0, 1, 2, 3, 4])
        assert InParallel(_stumbles)(worker, [0, 1, 3, 4]) == [0, 1, 3, 4]


def _stumbles_or_goes_on(worker: Worker, item: int) -> None:
    """The third stumbles, the others would pass the text for hours."""
    if item == 2:
        raise ValueError("--flag: 2 is refused")
    for _ in range(10**7):
        observe(worker, TEXT)


def _goes_on_and_on(worker: Worker, _: int) -> None:
    for _ in range(10**7):
        observe(worker, TEXT)


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """Also where a shell that started the tests beside others has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_others_stop_soon_after_an_error_or_an_interrupt(checkpoint_dir: Callable[[str], Path]) -> None:
    worker = worker_of(checkpoint_dir("llama"))
    with pytest.raises(ValueError, match="2 is refused"):
        InParallel(_stumbles_or_goes_on)(worker, [0, 1, 2])
    interrupt = threading.Timer(0.3, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
    interrupt.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        InParallel(_goes_on_and_on)(worker, [0, 1, 2, 3, 4, 5])
    assert time.monotonic() - begin < 60
    assert InParallel(_stumbles)(worker, [0, 1, 3]) == [0, 1, 3]


@pytest.mark.parametrize(
    ("method", "changes", "lanes"),
    [
        ("wanda", {}, 4),
        ("wanda", {"threads": 1}, 1),
        ("wanda", {"offload": True}, 1),
        ("wanda", {"shards": 2}, 1),
        ("sparsegpt", {}, 1),
    ],
)
def test_who_has_lanes(
    method: str, changes: dict[str, object], lanes: int, checkpoint_dir: Callable[[str], Path]
) -> None:
    spec = cpu_spec(checkpoint_dir("llama"), LinearPruner(method=method), threads=4)
    pool = InProcessPool(replace(spec, **changes))
    assert pool.first(parallel_tasks) == lanes


def test_items_come_when_there_is_room_and_answers_in_order(checkpoint_dir: Callable[[str], Path]) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for item in range(7):
            asked.append(item)
            yield item

    spec = replace(worker_of(checkpoint_dir("llama")).spec, threads=2)
    pool = InProcessPool(spec)
    seen = []
    for found in map_in_parallel(pool, _stumbles_never, items(), 10):
        seen.append(found)
        assert len(asked) <= len(seen) + 1
    assert seen == [10, 11, 12, 13, 14, 15, 16]


def _stumbles_never(worker: Worker, item: int, offset: int) -> int:
    return item + offset
