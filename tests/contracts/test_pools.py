"""Do all pools keep the contract of `neuronal_ray.workers.pools.protocol.Pool`, and give the same bits?"""

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import ray
import torch
from ray._private import state
from safetensors.torch import load_file, save_file
from tiny import LENGTH, VOCABULARY, cpu_spec
from tiny import write_model as write_tiny

from neuronal_ray.algorithms.allocations import neuronal
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.plan import Plan, uniform_rates
from neuronal_ray.core.problem import Problem, Terms
from neuronal_ray.evaluate.perplexity import perplexity
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.prune.compose import Composition
from neuronal_ray.prune.files import begin_model, write_model
from neuronal_ray.prune.search import Search
from neuronal_ray.prune.session import Session
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.pools.protocol import Pool, TaskError
from neuronal_ray.workers.pools.ray.pool import RayPool
from neuronal_ray.workers.shard import ChainTask, Passing, Steps
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.statistics import describe
from neuronal_ray.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_CPUS = 8  # as many as the actors of this file at their most; they need not exist
PATIENCE_S = 30.0
LAMBDAS = (0.05, 0.15, 0.25)


# Tasks: functions of a worker


def square(worker: Worker, item: int) -> int:
    return item * item


def dawdle(worker: Worker, item: int) -> int:
    """Even items take long, odd ones overtake them."""
    time.sleep(0.2 * (item % 2 == 0))
    return item


def add(worker: Worker, item: int, offset: int, factor: int) -> int:
    return (item + offset) * factor


def process(worker: Worker) -> int:
    return os.getpid()


def echo(worker: Worker, *args: object) -> tuple[object, ...]:
    return args


def stumble(worker: Worker, item: int) -> int:
    if item == 3:
        raise KeyError("the third")
    return item


def always_stumble(worker: Worker, item: int) -> int:
    raise KeyError("always")


def refuse(worker: Worker, item: int) -> int:
    if item == 3:
        raise BadInput("--flag: 3 is refused")
    return item


def fail(worker: Worker) -> None:
    raise RuntimeError("out of luck")


def _pass_on(worker: Worker, *_: object) -> Steps[str, str]:
    """The numbers of the shards that it came by."""
    passing = yield Passing([], "")
    passed = f"{passing.state}-{worker.spec.shard}"
    yield Passing([], passed)
    return passed


pass_on = ChainTask(_pass_on)


def note(worker: Worker, word: str) -> None:
    vars(worker).setdefault("words", []).append(word)


def noted(worker: Worker) -> list[str]:
    words: list[str] = vars(worker).get("words", [])
    return words


def die(worker: Worker, item: int) -> int:
    if item == 2:
        os._exit(1)
    return item


# Pools


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> WorkerSpec:
    return cpu_spec(write_tiny(tmp_path_factory.mktemp("pools") / "model"), LinearPruner(method="wanda"), dtype="auto")


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Ray for this file, with its token and its files in temporary places."""
    token = tmp_path_factory.mktemp("ray") / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    sockets = tempfile.mkdtemp(prefix="nr")  # sockets need short paths
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE"):  # Ray sets the last to "token"
            environment.setenv(name, "")
            environment.delenv(name)
        environment.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=NUM_CPUS,
            num_gpus=0,
            include_dashboard=False,
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=sockets,
        )
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors cannot import this module
        yield
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()
    shutil.rmtree(sockets, ignore_errors=True)


@dataclass(frozen=True)
class Kind:
    """How to open a pool, and how many workers it should have."""

    open: Callable[[WorkerSpec], Pool]
    replicas: int
    shards: int

    @property
    def workers(self) -> int:
        return self.replicas * self.shards


def in_process(shards: int, *, threads: int = 1) -> Kind:
    return Kind(lambda spec: InProcessPool(replace(spec, shards=shards, threads=threads)), 1, shards)


def ray_kind(replicas: int, shards: int = 1) -> Kind:
    def open_pool(spec: WorkerSpec) -> Pool:
        return RayPool(replace(spec, shards=shards), address="local", replicas=replicas)

    return Kind(open_pool, replicas, shards)


KINDS = {
    "in-process": in_process(1),
    "in-process, 2 shards": in_process(2),
    "in-process, 4 lanes": in_process(1, threads=4),
    "1 actor": ray_kind(1),
    "2 actors": ray_kind(2),
    "2 x 2 actors": ray_kind(2, 2),
}
PARAMS = [pytest.param(name, marks=[] if "in-process" in name else [pytest.mark.ray]) for name in KINDS]


@pytest.fixture(scope="module", params=PARAMS)
def kind(request: pytest.FixtureRequest) -> Kind:
    if "in-process" not in request.param:
        request.getfixturevalue("local_ray")
    return KINDS[request.param]


@pytest.fixture(scope="module")
def pool(kind: Kind, spec: WorkerSpec) -> Iterator[Pool]:
    pool = kind.open(spec)
    yield pool
    pool.close()


# Calls


def test_replicas(pool: Pool, kind: Kind) -> None:
    assert (pool.replicas, pool.shards) == (kind.replicas, kind.shards)


def test_results_come_in_the_order_of_the_items(pool: Pool) -> None:
    assert list(pool.map(square, range(9))) == [item * item for item in range(9)]
    assert list(pool.map(dawdle, [0, 1, 2, 3, 4, 5, 6])) == [0, 1, 2, 3, 4, 5, 6]


def test_no_items_give_no_results(pool: Pool) -> None:
    assert list(pool.map(square, [])) == []


def test_items_are_asked_for_when_they_can_be_taken(pool: Pool) -> None:
    asked: list[int] = []

    def items() -> Iterator[int]:
        for number in range(200):
            asked.append(number)
            yield number

    results = pool.map(square, items())
    assert next(results) == 0
    assert len(asked) < 200
    assert list(results) == [number * number for number in range(1, 200)]


def test_shared_arguments_reach_every_task(pool: Pool) -> None:
    assert list(pool.map(add, [1, 2, 3, 4, 5], 10, 2)) == [22, 24, 26, 28, 30]


def test_each_runs_on_every_worker(pool: Pool, kind: Kind) -> None:
    processes = 1 if isinstance(pool, InProcessPool) else kind.workers
    assert len(set(pool.each(process))) == processes
    assert pool.each(echo, 1, "two") == [(1, "two")] * kind.workers


def test_a_task_runs_on_one_shard_after_the_other(pool: Pool, kind: Kind) -> None:
    wanted = "".join(f"-{shard}" for shard in range(kind.shards))
    assert pool.first(pass_on) == wanted
    assert list(pool.map(pass_on, [0] * 5)) == [wanted] * 5
    assert pool.each(pass_on) == [wanted] * kind.replicas


def test_first_runs_on_the_first_worker(pool: Pool) -> None:
    assert pool.first(process) == pool.each(process)[pool.shards - 1]
    assert pool.first(echo, None, [3]) == (None, [3])


def test_a_map_left_half_way_leaves_the_pool_usable(pool: Pool) -> None:
    results = pool.map(dawdle, range(8))
    assert [next(results), next(results)] == [0, 1]
    del results
    assert list(pool.map(square, [2, 3])) == [4, 9]


# Errors


def test_an_error_in_a_task_is_said_once_with_the_item(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    results, seen = pool.map(stumble, [0, 1, 2, 3, 4]), []
    with pytest.raises(TaskError) as caught:
        seen.extend(results)
    assert seen == [0, 1, 2][: len(seen)], "what came before the error, which is raised when it is known"
    message = str(caught.value)
    assert message.startswith("stumble, item 4 of 5 failed:"), message
    assert message.count("the third") >= 1
    assert "KeyError" in message
    with pytest.raises(StopIteration):
        next(results)
    assert list(pool.map(square, [5])) == [25], "the pool is still good"
    assert "the third" not in capfd.readouterr().err


def test_only_the_first_of_many_errors_is_said(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TaskError, match=r"^always_stumble, item . of 8 failed:"):
        list(pool.map(always_stumble, range(8)))
    assert list(pool.map(square, range(4))) == [0, 1, 4, 9]
    assert "always" not in capfd.readouterr().err


def test_an_error_of_first_and_of_each_names_the_task(pool: Pool) -> None:
    with pytest.raises(TaskError, match=r"^fail\b(.|\n)*out of luck"):
        pool.first(fail)
    with pytest.raises(TaskError, match=r"^fail, worker 1 failed:(.|\n)*out of luck"):
        pool.each(fail)


def test_bad_input_stays_as_it_is(pool: Pool) -> None:
    with pytest.raises(BadInput, match=r"^--flag: 3 is refused$") as caught:
        list(pool.map(refuse, [1, 2, 3, 4]))
    assert type(caught.value) is BadInput


# Results do not depend on the pool


@dataclass(frozen=True)
class Outcome:
    """What a whole search and its evaluation gave, exactly."""

    scores: tuple[tuple[float, ...], ...]
    selected: tuple[float, ...]
    digest: bytes
    perplexities: tuple[float, ...]
    files: tuple[int, dict[str, bytes]]
    plan: Plan = field(compare=False)


def written(
    pool: Pool, plan: Plan, model: Path, target: Path, *, meanwhile: Callable[[], object] = lambda: None
) -> tuple[int, dict[str, bytes]]:
    """The zeros among the prunable weights of the model's files under `plan`, and the content of its tensors."""
    checkpoint = open_checkpoint(model)
    target.mkdir()
    parts = begin_model(checkpoint, pool, plan, target)
    meanwhile()
    zeros = write_model(checkpoint, pool, parts, plan, target, Progress(quiet=True))
    tensors = {name: tensor for part in parts for name, tensor in load_file(target / part.file).items()}
    assert tensors.keys() == checkpoint.tensors.keys()
    return zeros, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def search_on(pool: Pool, model: Path, folder: Path) -> Outcome:
    tokens = torch.randint(VOCABULARY, (200, LENGTH), generator=torch.Generator().manual_seed(0))
    progress = Progress(folder / "events.jsonl")
    layout = pool.first(describe)
    composition = Composition(
        terms=Terms(target=0.6, mode="paper"),
        pruner=LinearPruner(method="wanda"),
        allocation="neuronal",
        settings={},
        row_step=None,
        row_settings={},
        pruned_stream=False,
        window_start="papers",
    )
    session = Session(pool)
    session.hold(composition, tokens, progress, samples=4)
    search = Search(pool, layout=layout, calibration=tokens, samples=4, mode="paper", solves=False, progress=progress)
    found = neuronal.allocate(
        Problem(layout=layout, target=0.6, mode="paper", probe=search),
        block_lambdas=LAMBDAS,
        row_lambdas=(0.0, *LAMBDAS),
    )
    return Outcome(
        scores=tuple(step.scores for step in found.steps),
        selected=tuple(step.selected for step in found.steps),
        digest=found.plan.digest,
        perplexities=tuple(perplexity(pool, tokens[:20], plan) for plan in (None, found.plan)),
        files=written(pool, found.plan, model, folder / "files"),
        plan=found.plan,
    )


@pytest.fixture(scope="module")
def expected(spec: WorkerSpec, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    pool = InProcessPool(spec)
    outcome = search_on(pool, spec.model_path, tmp_path_factory.mktemp("expected"))
    pool.close()
    return outcome


def test_a_search_gives_the_same_bits_on_every_pool(
    pool: Pool, spec: WorkerSpec, expected: Outcome, tmp_path: Path
) -> None:
    assert search_on(pool, spec.model_path, tmp_path) == expected


def test_a_plan_travels_whole(pool: Pool) -> None:
    layout = pool.first(describe)
    rates = uniform_rates(layout, lambda block: 0.25 * (block + 1))
    plan = Plan({linear: (rate * 8).int() for linear, rate in rates.items()})
    (back,) = pool.first(echo, plan)
    assert back.digest == plan.digest


# The end


def living_actors() -> set[str]:
    """Ids of the actors that this Ray's head knows to be alive or on their way."""
    return {key for key, actor in state.actors().items() if actor["State"] != "DEAD"}


def assert_living_soon(expected: set[str]) -> None:
    give_up = time.monotonic() + PATIENCE_S
    while living_actors() != expected and time.monotonic() < give_up:
        time.sleep(0.1)
    assert living_actors() == expected


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_task_that_kills_its_workers_is_one_clear_error_and_close_leaves_no_actor(
    spec: WorkerSpec, caplog: pytest.LogCaptureFixture
) -> None:
    before = living_actors()
    pool = RayPool(spec, address="local", replicas=2)
    try:
        assert pool.replicas == 2
        assert len(living_actors() - before) == 2
        with pytest.raises(TaskError) as caught:
            list(pool.map(die, [0, 1, 2, 3, 4, 5]))
        message = str(caught.value)
        assert re.match(r"die, item [1-6] of 6: its worker died .*, 3 times", message), message
        assert len(message.splitlines()) == 1
        assert "a new worker takes its place" in caplog.text
    finally:
        pool.close()
    assert pool.replicas == 0
    pool.close()
    assert_living_soon(before)
    assert ray.is_initialized(), "this pool found a Ray and leaves it"


def when_whole(pool: RayPool) -> list[int]:
    """The processes of all workers, once those that take the place of lost ones are there."""
    give_up = time.monotonic() + PATIENCE_S
    while len(found := pool.each(process)) < pool.replicas * pool.shards and time.monotonic() < give_up:
        time.sleep(0.1)
    assert len(found) == pool.replicas * pool.shards
    return found


class Guest:
    """Takes the room of a worker."""

    def there(self) -> bool:
        return True


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_others_go_on_where_there_is_no_room_for_a_new_worker(spec: WorkerSpec) -> None:
    pool = RayPool(spec, address="local", replicas=2)
    guests = [ray.remote(Guest).options(num_cpus=1).remote() for _ in range(NUM_CPUS)]  # more than there is room for
    asked = [guest.there.remote() for guest in guests]
    try:
        _, waiting = ray.wait(asked, num_returns=NUM_CPUS, timeout=5.0)
        assert waiting
        pool.each(note, "first")
        killed = pool.each(process)[0]
        os.kill(killed, signal.SIGKILL)
        assert ray.wait(waiting, timeout=PATIENCE_S)[0], "a guest took the room"
        assert list(pool.map(square, [1, 2, 3, 4])) == [1, 4, 9, 16]
        pool.each(note, "second")
        assert pool.each(noted) == [["first", "second"]], "one worker is left"
        assert pool.first(process) != killed
        assert list(pool.map(square, [5, 6])) == [25, 36]
        for guest in guests:
            ray.kill(guest)
        assert killed not in when_whole(pool)
        assert pool.each(noted) == [["first", "second"]] * 2
    finally:
        pool.close()
        for guest in guests:
            ray.kill(guest)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_new_worker_is_brought_to_the_state_of_the_others(spec: WorkerSpec) -> None:
    pool = RayPool(spec, address="local", replicas=2)
    try:
        pool.each(note, "forgotten")
        pool.begin()
        pool.each(note, "first")
        pool.each(note, "second")  # in place of the first
        killed = pool.each(process)[0]
        os.kill(killed, signal.SIGKILL)
        assert list(pool.map(square, [1, 2, 3, 4])) == [1, 4, 9, 16]
        assert killed not in when_whole(pool)
        assert sorted(pool.each(noted)) == [["forgotten", "first", "second"], ["second"]]
        os.kill(pool.first(process), signal.SIGKILL)
        assert pool.first(add, 1, 2, 3) == 9
    finally:
        pool.close()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("shards", "delay"), [(1, 0.0), (2, 0.3)])
def test_a_search_that_loses_workers_gives_the_same_bits(
    shards: int, delay: float, spec: WorkerSpec, expected: Outcome, tmp_path: Path
) -> None:
    pool = RayPool(replace(spec, shards=shards), address="local", replicas=2)
    try:
        victims = [pool.each(process)[0], pool.each(process)[-1]]  # one of each replica
        kills = [
            threading.Timer(delay + 0.7 * number, os.kill, (victim, signal.SIGKILL))
            for number, victim in enumerate(victims)
        ]
        for kill in kills:
            kill.start()
        assert search_on(pool, spec.model_path, tmp_path) == expected
        for kill in kills:
            kill.join()
        workers = when_whole(pool)
        assert not set(victims) & set(workers)
        files = written(
            pool,
            expected.plan,
            spec.model_path,
            tmp_path / "again",
            meanwhile=lambda: os.kill(workers[0], signal.SIGKILL),  # it had begun one
        )
        assert files == expected.files
    finally:
        pool.close()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_hangs_is_replaced(spec: WorkerSpec, caplog: pytest.LogCaptureFixture) -> None:
    pool = RayPool(replace(spec, shards=2), address="local", replicas=2, task_timeout_s=8.0)
    try:
        stopped = pool.each(process)[-1]
        os.kill(stopped, signal.SIGSTOP)
        assert list(pool.map(square, range(12))) == [item * item for item in range(12)]
        assert stopped not in pool.each(process)
        assert "not done after 8 s" in caplog.text
    finally:
        pool.close()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_bad_weights_are_bad_input_of_the_pool_and_leave_no_actor(spec: WorkerSpec, tmp_path: Path) -> None:
    before = living_actors()
    shutil.copytree(spec.model_path, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^--model: NaN or infinite weights in block 0 mlp.up_proj$"):
        RayPool(replace(spec, model_path=tmp_path / "model"), address="local", replicas=1)
    assert_living_soon(before)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("device", "needed"), [("cpu", "CPUs"), ("cuda", "GPUs")])
def test_more_workers_than_the_cluster_has_room_for_are_refused(spec: WorkerSpec, device: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"--replicas: 99 workers need 99 {needed}"):
        RayPool(replace(spec, device=device), address="local", replicas=99)
