"""How does a search grow with the model, the text, the candidates and the workers, and does its floor grow likewise?"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch

from neuronal_ray.benchmark.live_bytes import LiveBytes
from neuronal_ray.benchmark.record import machine, publish
from neuronal_ray.benchmark.shapes import check_counts, device_of, kept_or_temporary
from neuronal_ray.benchmark.timed import Setting, forwards_alone, random_tokens, search_phases, timed_search, worker_of
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.lambdas import LAMBDAS
from neuronal_ray.models.synthetic import write_random_llama
from neuronal_ray.report.growth import Series, growth_table, write_growth_plots
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.worker import Worker

_DESCRIPTION = """Time searches that differ in one number from a small one, beside their floor (the candidates' forwards
alone), count the bytes of tensors that they hold, and fit exponents. Writes growth.svg, growth.png, growth.md and
growth.json. About four minutes on two cores. Example: neuronal-ray benchmark growth --output growth"""

_HEADS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One search: a LLaMA of `blocks` blocks of `hidden` features, `lambdas` lambdas, `samples` sequences."""

    blocks: int
    hidden: int
    lambdas: int
    samples: int
    length: int

    def at(self, folder: Path, *, device: str, threads: int | None) -> Setting:
        """The case as something to measure; its model is made in `folder` if it is not there yet."""
        path = folder / f"llama-{self.blocks}-{self.hidden}"
        if not path.is_dir():
            config = {
                "hidden_size": self.hidden,
                "intermediate_size": 11 * self.hidden // 4,
                "num_hidden_layers": self.blocks,
                "num_attention_heads": _HEADS,
                "vocab_size": 1024,
            }
            write_random_llama(path, config, dtype=torch.float32)
        return Setting(
            name=path.name,
            path=path,
            device=device,
            dtype="float32",
            samples=self.samples,
            length=self.length,
            calibration_samples=self.samples,
            lambdas=LAMBDAS[: self.lambdas],
            threads=threads,
        )


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """The case that the others differ from in one number, and the numbers of each series."""

    base: Case
    blocks: tuple[int, ...]
    hidden: tuple[int, ...]
    lambdas: tuple[int, ...]
    samples: tuple[int, ...]
    workers: tuple[int, ...]

    @property
    def cases(self) -> list[Case]:
        """All that are measured on one worker, each once."""
        found = [
            *(replace(self.base, blocks=count) for count in self.blocks),
            *(replace(self.base, hidden=size) for size in self.hidden),
            *(replace(self.base, lambdas=count) for count in self.lambdas),
            *(replace(self.base, samples=count) for count in self.samples),
        ]
        return list(dict.fromkeys(found))


RANGES = Ranges(
    base=Case(blocks=4, hidden=256, lambdas=8, samples=4, length=256),
    blocks=(2, 4, 8, 16),
    hidden=(128, 256, 512),
    lambdas=(2, 4, 8, 14),
    samples=(2, 4, 8, 16),
    workers=(1, 2),
)


@dataclass(frozen=True, kw_only=True)
class GrowthMeasured:
    """One series per number that was varied."""

    series: tuple[Series, ...]

    def lines(self) -> list[str]:
        """The printed table, in Markdown."""
        return growth_table(self.series)


@dataclass(frozen=True, kw_only=True)
class _Point:
    search_s: float
    floor_s: float
    candidates: int
    num_bytes: int

    def best(self, other: "_Point") -> "_Point":
        """The faster of both times of each."""
        return replace(self, search_s=min(self.search_s, other.search_s), floor_s=min(self.floor_s, other.floor_s))


def main(argv: Sequence[str]) -> None:
    """Measure, print the table, write the files."""
    parser = argparse.ArgumentParser(prog="neuronal-ray benchmark growth", description=_DESCRIPTION)
    parser.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="of all searches in turn, the fastest counts (default: 3)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: a GPU if any)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the table, the plots and the figures")
    arguments = parser.parse_args(argv)
    device = device_of(arguments.device)
    check_counts(arguments, rounds=1, threads=1)
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise BadInput(f"--output: {arguments.output} is not a directory")
    print(machine(), flush=True)
    with Progress().stage("searches", arguments.rounds * len(RANGES.cases)) as advance:
        measured = measure_growth(
            RANGES, device=device, threads=arguments.threads, rounds=arguments.rounds, advance=advance
        )
    print("\n".join(measured.lines()), flush=True)
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "growth.md").write_text("\n".join([str(machine()), "", *measured.lines()]) + "\n")
        write_growth_plots(measured.series, arguments.output)
        publish([measured], arguments.output / "growth.json")


def measure_growth(
    ranges: Ranges, *, device: str, threads: int | None, rounds: int, advance: Callable[[str], None] = lambda _: None
) -> GrowthMeasured:
    """Every case once, however many series it is in. Workers only where Ray is installed and on a CPU.

    `advance` is called with the name of each case when it is measured.
    """
    base = ranges.base
    points: dict[Case, _Point] = {}
    with kept_or_temporary(None) as folder:
        for number in range(rounds):  # all cases in turn: a busy moment does not spoil every round of one
            for case in ranges.cases:
                setting = case.at(folder, device=device, threads=threads)
                found = _measure(setting)
                points[case] = found if number == 0 else points[case].best(found)
                advance(f"{setting.name}, {case.samples} x {case.length} tokens, {case.lambdas} lambdas")

        def series(name: str, cases: Sequence[Case], values: Sequence[int]) -> Series:
            return _series(name, values, [points[case] for case in cases])

        by_lambdas = [replace(base, lambdas=count) for count in ranges.lambdas]
        by_samples = [replace(base, samples=count) for count in ranges.samples]
        measured = [
            series("blocks", [replace(base, blocks=count) for count in ranges.blocks], ranges.blocks),
            series("hidden size", [replace(base, hidden=size) for size in ranges.hidden], ranges.hidden),
            series("candidates", by_lambdas, [points[case].candidates for case in by_lambdas]),
            series("tokens", by_samples, [count * base.length for count in ranges.samples]),
        ]
        if ranges.workers and device == "cpu" and find_spec("ray") is not None:
            own = base.at(folder, device=device, threads=1)
            measured.append(_of_workers(own, ranges.workers, rounds=rounds))
    return GrowthMeasured(series=tuple(measured))


def _series(name: str, values: Sequence[int], points: Sequence[_Point]) -> Series:
    return Series(
        name=name,
        values=tuple(values),
        search_s=tuple(point.search_s for point in points),
        floor_s=tuple(point.floor_s for point in points),
        num_bytes=tuple(point.num_bytes for point in points),
    )


def _measure(setting: Setting) -> _Point:
    """Seconds without, and bytes with, the counting of bytes. Bytes are the model's and the most that live besides, in
    a search with one thread: one candidate at a time.
    """
    pool = InProcessPool(setting.spec)
    worker = worker_of(pool)
    tokens = random_tokens(setting, worker)
    worker.observe(tokens[:1])  # warm up
    run = timed_search(setting, pool, tokens)
    floor_s = forwards_alone(worker, tokens, run.plans[1], repeats=3) * run.distinct
    threads = torch.get_num_threads()
    again = InProcessPool(replace(setting.spec, threads=1))
    with LiveBytes() as live:
        timed_search(setting, again, tokens)
    torch.set_num_threads(threads)
    return _Point(
        search_s=run.search_s,
        floor_s=floor_s,
        candidates=run.distinct,
        num_bytes=live.peak + sum(tensor.nbytes for tensor in worker.replica.stream.model.parameters()),
    )


def _of_workers(setting: Setting, counts: Sequence[int], *, rounds: int) -> Series:
    """Workers of a local Ray, a thread each. The floor is one worker's, shared evenly; bytes are resident ones."""
    from neuronal_ray.workers.pools.ray.devices import connect, disconnect
    from neuronal_ray.workers.pools.ray.pool import RayPool

    before = torch.get_num_threads()
    here = InProcessPool(setting.spec)
    tokens = random_tokens(setting, worker_of(here))
    run = timed_search(setting, here, tokens)
    alone_s = forwards_alone(worker_of(here), tokens, run.plans[1], repeats=3) * run.distinct
    points = []
    connect("local")
    try:
        for count in counts:
            pool = RayPool(setting.spec, address="local", replicas=count)
            try:
                search_s = min(_pool_search_s(setting, pool, tokens) for _ in range(1 + rounds))  # one warms up
                resident = sum(pool.each(Worker.peak_memory))
            finally:
                pool.close()
            points.append(
                _Point(search_s=search_s, floor_s=alone_s / count, candidates=run.distinct, num_bytes=resident)
            )
    finally:
        disconnect()
        torch.set_num_threads(before)
    return _series("workers", counts, points)


def _pool_search_s(setting: Setting, pool: Pool, tokens: torch.Tensor) -> float:
    begin = time.perf_counter()
    layout, progress = pool.first(Worker.describe), Progress(quiet=True)
    search_phases(setting, pool, tokens, layout=layout, progress=progress, done=lambda _: None)
    return time.perf_counter() - begin
