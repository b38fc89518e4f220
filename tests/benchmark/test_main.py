"""Does the benchmark measure a valid search, count what it says, and refuse what it cannot do?"""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch

from neuronal_ray.benchmark.__main__ import MEASUREMENTS, main
from neuronal_ray.benchmark.device import Ceilings, measure_ceilings
from neuronal_ray.benchmark.kernels import measure_kernels
from neuronal_ray.benchmark.shapes import SHAPES, Shape, model_path
from neuronal_ray.benchmark.stages import FORWARDS, MASKS, RANKING, Stage, needs
from neuronal_ray.benchmark.timed import Setting, forwards_alone, random_tokens, timed_search, worker_of
from neuronal_ray.models.blocks import weight_of
from neuronal_ray.workers.pools.in_process import InProcessPool

pytestmark = pytest.mark.usefixtures("one_thread", "tiny")

HIDDEN, INNER, BLOCKS = 32, 48, 3
PRUNABLE = BLOCKS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape that is searched in a second."""
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "vocab_size": 128,
    }
    monkeypatch.setitem(SHAPES, "tiny", Shape(config=config, length=32))


def setting(folder: Path, **changes: object) -> Setting:
    values: dict = {
        "name": "tiny",
        "path": model_path("tiny", folder),
        "device": "cpu",
        "dtype": "float32",
        "samples": 2,
        "length": 32,
        "calibration_samples": 3,
        "lambdas": (0.05, 0.1, 0.2),
        "threads": 1,
    }
    return Setting(**(values | changes))


# The command


def test_every_measurement_is_a_module_with_main(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, (module, what) in MEASUREMENTS.items():
        assert callable(import_module(module).main), name
        assert f"  {name} " in listed
        assert what in listed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serach"], "unknown measurement 'serach', expected one of: search, "),
        (["search", "--shape", "9b"], "--shape: unknown name '9b', expected one of: builtin, wide, "),
        (["--shape", "tiny", "--blocks", "4"], "--blocks: 4 of a model of 3 blocks"),
        (["--shape", "builtin", "--blocks", "2"], "--blocks: the built-in model is measured whole"),
        (["--samples", "0"], "--samples: 0, expected at least 1"),
        (["--samples", "4", "--calibration-samples", "2"], "--calibration-samples: 2, expected at least 4"),
        (["--output", "/nowhere/at/all.json"], "--output: no directory /nowhere/at"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_without_a_name_the_search_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    words = ["--shape", "tiny", "--samples", "2", "--device", "cpu", "--threads", "1", "--literal-candidates", "2"]
    assert main([*words, "--repeats", "1", "--blocks", "2", "--output", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["machine"]["versions"]["torch"] == torch.__version__
    (found,) = document["measured"]
    assert (found["tried"], found["candidates"]) == (29, 28), "the row step's lambda 0 is the block step's winner"
    assert (found["blocks"], found["prunable"]) == (2, PRUNABLE * 2 // 3)
    spent = {stage["name"]: stage["seconds"] for stage in found["stages"]}
    assert {"masks", "ranking", "sparse forwards", "dense pass, calibration text", "statistics, candidates"} <= set(
        spent
    )
    assert sum(spent.values()) == pytest.approx(found["search_s"])
    assert spent["other"] >= 0, spent
    assert found["literal"]["candidates"] == 2
    printed = capsys.readouterr().out
    for line in (
        "sparse forwards alone",
        "the same, in parallel",
        "arithmetic floor",
        "literal / search",
        "peak memory",
        "masks",
    ):
        assert line in printed, printed


# What is measured


def test_the_search_of_a_random_model_is_valid_and_the_same_where_blocks_visit(tmp_path: Path) -> None:
    plans = []
    for offload in (False, True):
        own = setting(tmp_path, offload=offload)
        pool = InProcessPool(own.spec)
        tokens = random_tokens(own, worker_of(pool))
        first, second = (timed_search(own, pool, tokens) for _ in range(2))
        assert (first.tried, first.distinct) == (7, 6)
        assert [plan.digest for plan in first.plans] == [plan.digest for plan in second.plans]
        for plan in first.plans:
            plan.check(worker_of(pool).layout)
        plans.append([plan.digest for plan in first.plans])
    assert plans[0] == plans[1]
    assert plans[0][0] != plans[0][1]


def test_overflow_is_no_measurement(tmp_path: Path) -> None:
    own = setting(tmp_path)
    pool = InProcessPool(own.spec)
    worker = worker_of(pool)
    for module in worker.replica.linears[2].values():
        weight_of(module).mul_(1e30)
    with pytest.raises(ValueError, match=r"NaN or infinite activations|candidates overflowed"):
        timed_search(own, pool, random_tokens(own, worker))


def test_the_floor_is_the_masked_blocks_and_leaves_the_model_dense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = setting(tmp_path)
    pool = InProcessPool(own.spec)
    worker = worker_of(pool)
    tokens = random_tokens(own, worker)
    plan = timed_search(own, pool, tokens).plans[1]
    dense = {name: tensor.clone() for name, tensor in worker.replica.stream.model.state_dict().items()}
    seen: dict[int, list[int]] = {}
    own_block = worker.replica.stream.block

    def block(index: int, recording: object) -> object:
        zeros = sum(int((weight_of(module) == 0).sum()) for module in worker.replica.linears[index].values())
        seen.setdefault(index, []).append(zeros)
        return own_block(index, recording)

    monkeypatch.setattr(worker.replica.stream, "block", block)
    assert forwards_alone(worker, tokens[:2], plan, repeats=3) > 0
    for index, specs in enumerate(worker.layout.blocks):
        removed = sum(int(plan.removed[spec.linear].sum()) for spec in specs)
        assert seen[index] == [removed] * 4, "three passes that are timed, and one to go on from"
    assert all(torch.equal(tensor, dense[name]) for name, tensor in worker.replica.stream.model.state_dict().items())


def test_operations_and_bytes_are_counted_by_hand(tmp_path: Path) -> None:
    worker = worker_of(InProcessPool(setting(tmp_path).spec))
    need = needs(worker.layout, tokens=64, calibration_tokens=96, candidates=6, item=4)
    assert need[FORWARDS].flops == 2 * (PRUNABLE - HIDDEN * INNER) * 64 * 6, "without the last down_proj"
    assert need["dense pass, calibration text"].flops == 2 * PRUNABLE * 96
    assert need["dense pass, search text"].flops == 2 * PRUNABLE * 64
    assert need[RANKING].moved == PRUNABLE * (4 + 2)
    assert need[MASKS].moved == PRUNABLE * (4 + 2 + 4) * 6
    inputs = BLOCKS * (3 * HIDDEN + INNER)  # of q, k, v; of o; of gate, up; of down
    assert need["statistics, candidates"].moved == inputs * 4 * 64 * 6
    stage = Stage.of(MASKS, 0.5, need[MASKS])
    said = stage.line(2.0, Ceilings(flops=1e12, bandwidth=stage.moved * 8))
    assert "25.0%" in said
    assert said.endswith("(25.0%)")


def test_ceilings_are_positive() -> None:
    found = measure_ceilings(torch.device("cpu"), torch.float32)
    assert found.flops > 1e8
    assert found.bandwidth > 1e8


def test_every_kernel_is_measured_beside_its_reference_and_its_bytes() -> None:
    found = measure_kernels(torch.device("cpu"), rows=8, columns=16, tokens=4)
    cases = {(kernel.name, kernel.dtype) for kernel in found.kernels}
    assert cases == {(name, dtype) for name in ("cut", "squares") for dtype in ("float32", "bfloat16")} | {
        ("rank", "float32")
    }
    assert all(min(kernel.kernel_s, kernel.reference_s, kernel.floor_s) > 0 for kernel in found.kernels), found
    assert len(found.lines()) == 1 + len(cases)
