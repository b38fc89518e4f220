"""The overhead of Ray and the gain of replicas: one search in this process, on one and two replicas, on two shards."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from neuronal_ray.algorithms.allocations import neuronal
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.benchmark.output import add_output, check_figures
from neuronal_ray.benchmark.record import publish
from neuronal_ray.benchmark.shapes import kept_or_temporary, length_of, model_path
from neuronal_ray.cli.memory import private_bytes
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.lambdas import LAMBDAS
from neuronal_ray.core.plan import uniform_rates
from neuronal_ray.core.problem import Problem
from neuronal_ray.core.stats import SquareSum
from neuronal_ray.prune.search import Search
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.pools.ray.devices import connect, disconnect
from neuronal_ray.workers.pools.ray.pool import RayPool
from neuronal_ray.workers.spec import WorkerSpec
from neuronal_ray.workers.tasks.statistics import describe, keep_statistics, observe_all, rank

_ROUNDS = 3
_HERE = "in process"
_LEAST_GAIN, _MOST_OVERHEAD = 1.8, 0.05
_TARGET = 0.7
_LAMBDAS = LAMBDAS[::2][:6]  # an even number: of an odd number one of two replicas would miss one


@dataclass(frozen=True, kw_only=True)
class ClusterMeasured:
    """Seconds of one search, the best of several rounds, and the growth in bytes of a Ray pool's driver."""

    model: str
    candidates: int
    in_process_s: float
    one_replica_s: float
    two_replicas_s: float
    two_shards_s: float
    driver_growth: int
    hidden_bytes: int

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
        overhead = self.one_replica_s / self.in_process_s - 1
        return [
            f"{self.model}: {self.candidates} candidates, one torch thread per worker, best of {_ROUNDS} rounds",
            f"  in this process     {self.in_process_s:8.2f} s",
            f"  Ray, 1 replica      {self.one_replica_s:8.2f} s   over in-process {overhead:+.1%} "
            f"(at most {_MOST_OVERHEAD:.0%})",
            f"  Ray, 2 replicas     {self.two_replicas_s:8.2f} s   1 / 2 replicas = "
            f"{self.one_replica_s / self.two_replicas_s:.2f} (at least {_LEAST_GAIN:g})",
            f"  Ray, 2 shards       {self.two_shards_s:8.2f} s   1 replica / 2 shards = "
            f"{self.one_replica_s / self.two_shards_s:.2f}; {self.hidden_bytes / 2**20:.1f} MiB of hidden states "
            "passed on by each candidate",
            f"  driver              {self.driver_growth / 2**20:8.1f} MiB more after a search on Ray, at most",
        ]


def main(argv: Sequence[str]) -> None:
    """Measure on the wide model."""
    parser = Parser(
        prog="neuronal-ray benchmark cluster",
        description="Time one search in this process and on one replica, two replicas and two shards of a local Ray.",
    )
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_figures(arguments)
    with kept_or_temporary(None) as folder:
        measured = measure_cluster(model_path("wide", folder), name="wide", length=length_of("wide"))
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def measure_cluster(model: Path, *, name: str, length: int, samples: int = 2) -> ClusterMeasured:
    """Time the search of `paper` mode in every setting, in rounds; starts a local Ray."""
    spec = WorkerSpec(
        model_path=model,
        device="cpu",
        dtype="float32",
        pruner=LinearPruner(method="wanda"),
        threads=1,
        trust_remote_code=False,
    )
    vocabulary, hidden = 2048, 0
    text = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    pools: dict[str, Callable[[], Pool]] = {
        _HERE: lambda: InProcessPool(spec),
        "1 replica": lambda: RayPool(spec, address="local", replicas=1),
        "2 replicas": lambda: RayPool(spec, address="local", replicas=2),
        "2 shards": lambda: RayPool(replace(spec, shards=2), address="local", replicas=1),
    }
    best: dict[str, float] = {}
    scores: set[tuple[tuple[float, ...], ...]] = set()
    opened: dict[str, Pool] = {}
    growth = 0
    connect("local")  # the pools join this Ray, which outlives them
    try:
        for _ in range(_ROUNDS):
            for setting, open_pool in pools.items():
                pool = open_pool()
                opened[setting] = pool
                layout = pool.first(describe)
                hidden = text.numel() * layout.specs[0].columns * 4
                (statistics,) = pool.first(observe_all, text, (SquareSum,))
                pool.each(keep_statistics, statistics)
                pool.each(rank)
                search = Search(
                    pool,
                    layout=layout,
                    calibration=text,
                    samples=samples,
                    mode="paper",
                    solves=False,
                    progress=Progress(quiet=True),
                )
                problem = Problem(layout=layout, target=_TARGET, mode="paper", probe=search)
                uniform = problem.plan(uniform_rates(layout, lambda _: _TARGET), rows_adapted=False)
                search.losses("warm-up", [0.0], [uniform])
                before_search = private_bytes()
                begin = time.perf_counter()
                allocation = neuronal.allocate(problem, block_lambdas=_LAMBDAS, row_lambdas=_LAMBDAS)
                seconds = time.perf_counter() - begin
                best[setting] = min(best.get(setting, seconds), seconds)
                scores.add(tuple(step.scores for step in allocation.steps))
                if setting != _HERE:
                    growth = max(growth, private_bytes() - before_search)
                candidates = search.evaluations
                opened.pop(setting).close()
        assert len(scores) == 1, "the settings disagree"
    finally:
        for pool in opened.values():
            pool.close()
        disconnect()
        torch.set_num_threads(before)
    return ClusterMeasured(
        model=name,
        candidates=int(candidates),
        in_process_s=best[_HERE],
        one_replica_s=best["1 replica"],
        two_replicas_s=best["2 replicas"],
        two_shards_s=best["2 shards"],
        driver_growth=growth,
        hidden_bytes=hidden,
    )
