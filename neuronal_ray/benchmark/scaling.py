"""Predicted times and bottlenecks of a search on larger machines, from costs measured here and a model of the search.

Measured in the run, on this machine's CPU: the cost of a call through Ray, the rate of tensors from actor to actor, and
the time of a candidate over that of its arithmetic. Assumed, and printed: a device's speed. The search is that of
`paper` mode: two steps, each of which ends with its last candidate.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.benchmark.device import measure_ceilings
from neuronal_ray.benchmark.output import add_output, check_figures
from neuronal_ray.benchmark.record import publish
from neuronal_ray.benchmark.shapes import SHAPES
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.parser import Parser
from neuronal_ray.core.lambdas import LAMBDAS
from neuronal_ray.models.synthetic import empty_llama, write_random_llama
from neuronal_ray.workers.footprint import GIB, Devices, Footprint, Work, fit, needed_devices
from neuronal_ray.workers.pools.ray.costs import measure_ray_costs
from neuronal_ray.workers.pools.ray.devices import connect, disconnect
from neuronal_ray.workers.pools.ray.pool import RayPool
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks import candidates
from neuronal_ray.workers.tasks.statistics import rank
from neuronal_ray.workers.worker import Worker

MODELS = ("7b", "13b", "70b")

DEVICE_GIB = (24, 40, 80, 141)
DEVICES = (1, 2, 4, 8, 16, 32, 64)
SEARCH_TOKENS = 8 * 2048
RATE, BANDWIDTH, MEMORY_GIB = 200e12, 2e12, 80
"""The assumptions about a device: bfloat16 operations and bytes per second that a candidate reaches, and its memory."""

_STEPS = (len(LAMBDAS), len(LAMBDAS))
_WORK = Work(item=2, held=SEARCH_TOKENS)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Measured: seconds of a call, bytes per second from actor to actor, a candidate's time over its arithmetic's."""

    call_s: float
    handed_rate: float
    over_arithmetic: float


@dataclass(frozen=True, kw_only=True)
class Point:
    """One layout: the seconds of both steps and what most of them are spent on."""

    model: str
    devices: int
    shards: int
    replicas: int
    seconds: float
    bottleneck: str


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """The measured costs, the shards that models need on devices, and the predictions."""

    costs: Costs
    shards: dict[str, dict[int, int | None]]
    offloaded_bytes: dict[str, int]
    points: list[Point]

    def lines(self) -> list[str]:
        """Return the lines of the printed tables, in Markdown."""
        costs = self.costs
        lines = [
            f"measured here: {costs.call_s * 1e3:.2f} ms a call through Ray, {costs.handed_rate / 2**20:.0f} MiB/s "
            f"from actor to actor, a candidate takes {costs.over_arithmetic:.2f} times its arithmetic",
            f"assumed: {RATE / 1e12:.0f} TFLOP/s and {BANDWIDTH / 1e12:g} TB/s of a device of {MEMORY_GIB} GiB",
            "",
            "| model | " + " | ".join(f"{size} GiB" for size in DEVICE_GIB) + " | with offloaded blocks |",
            "|---|" + "---|" * (len(DEVICE_GIB) + 1),
        ]
        for name, counts in self.shards.items():
            cells = ["-" if count is None else f"{count}" for count in counts.values()]
            cells.append(f"{self.offloaded_bytes[name] / GIB:.1f} GiB")
            lines.append(f"| {name.upper()} | " + " | ".join(cells) + " |")
        lines += ["", "| model | devices | replicas x shards | search | bottleneck |", "|---|---|---|---|---|"]
        lines += [
            f"| {point.model.upper()} | {point.devices} | {point.replicas} x {point.shards} | {point.seconds:.1f} s | "
            f"{point.bottleneck} |"
            for point in self.points
        ]
        return lines


def main(argv: Sequence[str]) -> None:
    """Measure and predict."""
    parser = Parser(
        prog="neuronal-ray benchmark scaling",
        description="Predict the time of a search on 1 to 64 devices, from costs measured here and an assumed speed.",
    )
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_figures(arguments)
    scaling = predictions()
    print("\n".join(scaling.lines()), flush=True)
    publish([scaling], arguments.output)


def predictions() -> Scaling:
    """Measure the costs on a local Ray, and predict."""
    footprints = {name: Footprint.of(empty_llama(**SHAPES[name].config), _WORK) for name in MODELS}
    costs = _measured()
    return Scaling(
        costs=costs,
        shards={
            name: {size: needed_devices(footprint, size * GIB) for size in DEVICE_GIB}
            for name, footprint in footprints.items()
        },
        offloaded_bytes={name: footprint.offloaded() for name, footprint in footprints.items()},
        points=[
            predicted(name, footprint, count, shards, costs)
            for name, footprint in footprints.items()
            for count in DEVICES
            for shards in _layouts(footprint, count)
        ],
    )


def _layouts(footprint: Footprint, count: int) -> Sequence[int]:
    """Return the number of shards that the planner chooses for `count` devices, and twice and four times as many."""
    devices = Devices(kind="GPU", memory=(MEMORY_GIB * GIB,) * count)
    try:
        least = fit(footprint, devices).shards
    except BadInput:
        return ()
    return [least * times for times in (1, 2, 4) if least * times <= min(count, len(footprint.weights))]


def predicted(name: str, footprint: Footprint, devices: int, shards: int, costs: Costs) -> Point:
    """Predict a search: n candidates on R chains of S shards take ceil(n / R) + S - 1 turns of one shard."""
    weights = sum(footprint.weights) / 2  # bfloat16
    hidden = SEARCH_TOKENS * SHAPES[name].config["hidden_size"] * 2
    replicas = max(1, devices // shards)
    parts = {
        "arithmetic": 2 * weights * SEARCH_TOKENS / RATE * costs.over_arithmetic / shards,
        "memory": (3 * sum(footprint.weights) + sum(footprint.ranks)) / BANDWIDTH / shards,  # masked, written, read
        "hidden states": hidden / costs.handed_rate if shards > 1 else 0.0,
        "calls": costs.call_s,
    }
    turn = sum(parts.values())
    turns = sum(math.ceil(candidates / replicas) + shards - 1 for candidates in _STEPS)
    busy = sum(candidates / replicas for candidates in _STEPS)
    spent = {part: seconds * busy for part, seconds in parts.items()}
    spent["idle devices"] = turn * (turns - busy)
    return Point(
        model=name,
        devices=devices,
        shards=shards,
        replicas=replicas,
        seconds=turn * turns,
        bottleneck=max(spent, key=lambda part: spent[part]),
    )


def _measured() -> Costs:
    connect("local")
    try:
        of_ray = measure_ray_costs()
        return Costs(call_s=of_ray.call_s, handed_rate=of_ray.handed_rate, over_arithmetic=_over_arithmetic())
    finally:
        disconnect()


def _over_arithmetic() -> float:
    """Return a candidate's seconds on a Ray worker, over those of its products at the speed of a large product."""
    with TemporaryDirectory() as folder:
        shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16}
        path = Path(folder) / "model"
        write_random_llama(path, shape | {"vocab_size": 256, "max_position_embeddings": 512}, dtype=torch.float32)
        spec = WorkerSpec(
            model_path=path,
            device="cpu",
            dtype="float32",
            pruner=LinearPruner(method="magnitude"),
            threads=1,
            trust_remote_code=False,
        )
        pool = RayPool(spec, address="local", replicas=1)
        try:
            return pool.first(_ratio)
        finally:
            pool.close()


def _ratio(worker: Worker) -> float:
    from neuronal_ray.core.plan import exact_plan, uniform_rates

    text = torch.randint(256, (4, 512), generator=torch.Generator().manual_seed(0))
    rank(worker)
    candidates.set_search_text(worker, text, None, chunk=4, with_reference=True)
    plan = exact_plan(worker.layout, uniform_rates(worker.layout, lambda _: 0.7), target=0.7)
    candidates.trial(worker, plan)
    begin = time.perf_counter()
    for _ in range(3):
        candidates.trial(worker, plan)
    candidate_s = (time.perf_counter() - begin) / 3
    ceilings = measure_ceilings(worker.device, worker.replica.stream.model.dtype)
    return candidate_s / (2 * worker.layout.prunable * text.numel() / ceilings.flops)
