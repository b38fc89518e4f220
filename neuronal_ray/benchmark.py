"""`python -m neuronal_ray.benchmark`: the search against a literal implementation, both measured in one run."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from neuronal_ray import benchmark_inference
from neuronal_ray.entry import exit_code

if TYPE_CHECKING:
    from neuronal_ray.benchmark_methods import MethodsMeasured
    from neuronal_ray.recipe import Recipe
    from neuronal_ray.worker import Worker

_DESCRIPTION = """Time NeuronAL's search in `paper` mode on two models and compare it, in the same run, with a literal
implementation that sorts again and runs dense and sparse weights for every lambda, as the released code does; and
what allocations, refinements and solvers cost beside the dense pass and the matrix work that they need anyway."""
_TARGET = 0.7
_VOCABULARY = 2048
_PRODUCT = 2048


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's search. The ratios compare a candidate of the literal search with one of ours, ranking, dense pass
    and statistics included in ours by their share.
    """

    model: str
    tokens: int
    candidates: int
    search_s: float
    breakdown_s: dict[str, float]
    sparse_forwards_s: float
    literal_candidates: int
    literal_ratio: float
    literal_all_statistics_ratio: float
    flops: float
    floor_s: float

    def lines(self) -> list[str]:
        """The rows of the printed table."""
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in self.breakdown_s.items())
        return [
            f"{self.model}: {self.candidates} candidates, {self.tokens} search tokens",
            f"  search                     {self.search_s:9.2f} s   ({parts})",
            f"  its sparse forwards alone  {self.sparse_forwards_s:9.2f} s   search / forwards = "
            f"{self.search_s / self.sparse_forwards_s:.2f}",
            f"  arithmetic floor           {self.floor_s:9.2f} s   {self.flops:.3g} operations at the measured peak; "
            f"search / floor = {self.search_s / self.floor_s:.2f}",
            f"  literal / search           {self.literal_ratio:9.2f}     median of {self.literal_candidates}, "
            "each timed next to one of ours",
            f"  released / search          {self.literal_all_statistics_ratio:9.2f}     the literal one with the mean "
            "and variance that the released hooks take too",
        ]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 2 for bad input."""
    if (sys.argv[1:] if argv is None else argv)[:1] == ["inference"]:
        return benchmark_inference.main((sys.argv[1:] if argv is None else argv)[1:])
    return exit_code("neuronal-ray benchmark", lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="neuronal-ray benchmark", description=_DESCRIPTION)
    parser.add_argument(
        "--part",
        choices=("search", "methods", "sweep", "cluster", "scaling"),
        help="the search; allocations, refinements and solvers; what a sweep saves; what Ray costs and replicas gain; "
        "or what is to be expected on larger machines. If absent the first two",
    )
    parser.add_argument("--only", choices=("builtin", "wide"), help="one of the two models of the search")
    parser.add_argument("--literal-candidates", type=int, default=3, metavar="N", help="measured per step (default: 3)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="(default: float32)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the figures")
    arguments = parser.parse_args(argv)
    if arguments.literal_candidates < 1:
        raise ValueError(f"--literal-candidates: {arguments.literal_candidates} is not positive")
    with tempfile.TemporaryDirectory() as folder:
        results: list[dict[str, object]] = []
        wide = _wide_model(Path(folder))
        if arguments.part in (None, "methods"):
            methods = _measure_methods(wide, threads=arguments.threads)
            print("\n".join(methods.lines()), flush=True)
            results.append(asdict(methods))
        if arguments.part == "sweep":
            from neuronal_ray.benchmark_sweep import measure_sweep

            sweep = measure_sweep(Path(folder), threads=arguments.threads)
            print("\n".join(sweep.lines()), flush=True)
            results.append(asdict(sweep))
        if arguments.part == "cluster":
            from neuronal_ray.benchmark_cluster import measure_cluster

            cluster = measure_cluster(Path(wide), name="wide", length=512)
            print("\n".join(cluster.lines()), flush=True)
            results.append(asdict(cluster))
        if arguments.part == "scaling":
            from neuronal_ray.benchmark_scaling import predictions

            scaling = predictions()
            print("\n".join(scaling.lines()), flush=True)
            results.append(asdict(scaling))
        names = [arguments.only] if arguments.only else ["builtin", "wide"]
        for name in names if arguments.part in (None, "search") else []:
            measured = _measure(
                name,
                name if name == "builtin" else wide,
                256 if name == "builtin" else 512,
                dtype=arguments.dtype,
                threads=arguments.threads,
                literal_candidates=arguments.literal_candidates,
            )
            print("\n".join(measured.lines()), flush=True)
            results.append(asdict(measured))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


def _measure(
    name: str, model: str, length: int, *, dtype: str, threads: int | None, literal_candidates: int
) -> Measured:
    import torch

    from neuronal_ray.allocations import Problem, neuronal
    from neuronal_ray.benchmark_literal import literal_candidate
    from neuronal_ray.models.checkpoint import resolve_model
    from neuronal_ray.pool import InProcessPool
    from neuronal_ray.progress import Progress
    from neuronal_ray.search import Search
    from neuronal_ray.worker import Worker, WorkerSpec

    spec = WorkerSpec(
        model_path=resolve_model(model),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype=dtype,
        recipe=Recipe(method="wanda"),
        threads=threads,
        trust_remote_code=False,
        profile=True,
    )
    pool = InProcessPool(spec)
    worker = pool.first(_itself)
    layout = worker.layout
    text = torch.randint(_VOCABULARY, (8, length), generator=torch.Generator().manual_seed(0))
    worker.observe(text)  # warm up
    worker.stopwatch.seconds.clear()

    begin = time.perf_counter()
    pool.each(Worker.keep_statistics, pool.first(Worker.observe, text))
    pool.each(Worker.rank)
    search = Search(
        pool, layout=layout, calibration=text, samples=len(text), mode="paper", solves=False, progress=Progress()
    )
    problem = Problem(layout=layout, target=_TARGET, mode="paper", probe=search)
    allocation = neuronal.allocate(problem)
    search_s = time.perf_counter() - begin

    breakdown = dict(worker.stopwatch.seconds)
    breakdown["other"] = search_s - sum(breakdown.values())
    candidates = len(search.candidates)
    inputs = [worker.replica.stream.start(part) for part in text.to(worker.device).split(1)]
    plans = [allocation.baselines["block"], allocation.plan]  # one of each step: their cost is the same within a step
    shared_s = (breakdown["dense pass"] + breakdown["ranking"] + breakdown["other"]) / candidates
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for index in range(literal_candidates):
        plan = plans[index % 2]
        ours_s = _seconds(partial(worker.trial, plan)) + shared_s
        for all_statistics, found in ratios.items():
            call = partial(literal_candidate, worker, inputs, plan, all_statistics=all_statistics)
            found.append(_seconds(call) / ours_s)
    flops = 2.0 * layout.prunable * text.numel() * candidates
    return Measured(
        model=f"{name} ({dtype}, {pool.first(Worker.device_name)})",
        tokens=text.numel(),
        candidates=candidates,
        search_s=search_s,
        breakdown_s=breakdown,
        sparse_forwards_s=breakdown["sparse forwards"],
        literal_candidates=literal_candidates,
        literal_ratio=median(ratios[False]),
        literal_all_statistics_ratio=median(ratios[True]),
        flops=flops,
        floor_s=flops / _peak_rate(worker),
    )


def _measure_methods(model: str, *, threads: int | None) -> "MethodsMeasured":
    import torch

    from neuronal_ray.benchmark_methods import measure_methods
    from neuronal_ray.models.checkpoint import resolve_model
    from neuronal_ray.recipe import Recipe
    from neuronal_ray.worker import WorkerSpec

    spec = WorkerSpec(
        model_path=resolve_model(model),
        device="cuda" if torch.cuda.is_available() else "cpu",
        dtype="float32",
        recipe=Recipe(method="wanda"),
        threads=threads,
        trust_remote_code=False,
        profile=True,
    )
    text = torch.randint(_VOCABULARY, (4, 512), generator=torch.Generator().manual_seed(0))
    return measure_methods(spec, text, name="wide (float32)", target=_TARGET)


def _wide_model(folder: Path) -> str:
    from neuronal_ray.models.checkpoint import write_random_llama

    write_random_llama(
        folder,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        vocab_size=_VOCABULARY,
        max_position_embeddings=512,
    )
    return str(folder)


def _seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _itself(worker: "Worker") -> "Worker":
    return worker


def _peak_rate(worker: "Worker") -> float:
    """Floating-point operations per second of a large matrix product in the worker's dtype, best of five."""
    import torch

    matrix = torch.ones(_PRODUCT, _PRODUCT, device=worker.device, dtype=worker.replica.stream.model.dtype)
    best = 0.0
    for _ in range(5):
        begin = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = max(best, 2 * _PRODUCT**3 / (time.perf_counter() - begin))
    return best


if __name__ == "__main__":
    sys.exit(main())
