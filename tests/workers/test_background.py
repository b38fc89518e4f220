"""Does work beside others' go on, one call after the other, and end when nobody waits for it?"""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import cpu_spec

import neuronal_ray.workers.tasks.model_files
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.core.plan import Plan, exact_plan, uniform_rates
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.models.output_files import OutputFile, plan_output_files
from neuronal_ray.prune.files import begin_model
from neuronal_ray.workers.background import Background
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.tasks.final_model import settle
from neuronal_ray.workers.tasks.model_files import write, write_ahead, written
from neuronal_ray.workers.tasks.statistics import keep_statistics, observe, rank
from neuronal_ray.workers.worker import Worker

TEXT = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(0))


def plan_of(worker: Worker, rate: float) -> Plan:
    return exact_plan(worker.layout, uniform_rates(worker.layout, lambda _: rate), target=rate)


class Gate:
    """Holds the masks of every block back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, self.passed = threading.Event(), threading.Event(), 0
        own = neuronal_ray.workers.tasks.model_files.zero_masked

        def masked(*args: object) -> dict[str, int]:
            self.reached.set()
            self.opened.wait(60)
            self.passed += 1
            return own(*args)

        monkeypatch.setattr(neuronal_ray.workers.tasks.model_files, "zero_masked", masked)


def test_calls_are_made_one_after_the_other_and_their_results_are_found() -> None:
    background: Background[int] = Background()
    go, order = threading.Event(), []

    def call(number: int) -> int:
        go.wait(60)
        order.append(number)
        return number

    for number in range(3):
        background.begin(str(number), lambda _, number=number: call(number))
    assert background.results(0.01) == {"0": None, "1": None, "2": None}
    go.set()
    assert background.results(60) == {"0": 0, "1": 1, "2": 2}
    assert order == [0, 1, 2]
    background.end()
    assert background.results(0) == {}


def test_an_error_is_raised_where_results_are_asked_for() -> None:
    background: Background[int] = Background()

    def fail(_: threading.Event) -> int:
        raise OSError("full")

    background.begin("one", fail)
    with pytest.raises(OSError, match="full"):
        background.results(60)
    background.end()


def test_the_end_stops_the_call_under_way_and_drops_those_to_come() -> None:
    background: Background[bool] = Background()
    begun, made = threading.Event(), []

    def until_stopped(stop: threading.Event) -> bool:
        begun.set()
        made.append(stop.wait(60))
        return True

    background.begin("first", until_stopped)
    background.begin("second", until_stopped)
    assert begun.wait(60)
    background.end()
    assert made == [True]
    background.begin("third", lambda stop: stop.is_set())
    assert background.results(60) == {"third": False}, "it can be used again"
    background.end()


# Files


def test_files_begun_ahead_have_what_was_final_then(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_dir("llama")
    worker = Worker.build(cpu_spec(path, LinearPruner(method="wanda")))
    plan = plan_of(worker, 0.6)
    (part,) = plan_output_files(open_checkpoint(path), worker.layout, [worker.blocks])
    settle(worker, plan, TEXT, Walk(pruned=True))
    (tmp_path / "now").mkdir()
    zeros = write(worker, part, plan, tmp_path / "now")
    gate = Gate(monkeypatch)
    (tmp_path / "ahead").mkdir()
    write_ahead(worker, part, plan, tmp_path / "ahead")
    assert gate.reached.wait(60)
    assert written(worker, 0.0) == {part.file: None}
    settle(worker, plan_of(worker, 0.2), TEXT.flip(0), Walk(pruned=True))
    gate.opened.set()
    assert written(worker, 60.0) == {part.file: zeros}
    assert (tmp_path / "ahead" / part.file).read_bytes() == (tmp_path / "now" / part.file).read_bytes()
    worker.close()


def test_a_pool_that_is_closed_writes_no_further(
    checkpoint_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint_dir("llama")
    pool = InProcessPool(cpu_spec(path, LinearPruner(method="wanda")))
    pool.each(keep_statistics, pool.first(observe, TEXT))
    pool.each(rank)
    gate = Gate(monkeypatch)
    parts: list[OutputFile] = begin_model(open_checkpoint(path), pool, pool.first(plan_of, 0.6), tmp_path)
    assert len(parts[0].blocks) > 1
    assert gate.reached.wait(60)
    opening = threading.Timer(0.3, gate.opened.set)
    opening.start()
    pool.close()
    opening.join()
    assert gate.passed == 1, "of the block that it was at"
