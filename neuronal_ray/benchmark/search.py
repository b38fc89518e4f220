"""The time of a search by stage, compared with the device's ceilings and with a literal implementation.

Measured in one run: the search of `paper` mode, the ceilings of the device, the candidates' sparse forwards alone (the
floor), and a literal search (benchmark/literal.py).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from neuronal_ray.benchmark.device import Ceilings, device_peak, forget_peak, measure_ceilings, seconds, settle
from neuronal_ray.benchmark.literal import literal_candidate
from neuronal_ray.benchmark.output import check_figures
from neuronal_ray.benchmark.record import machine, publish
from neuronal_ray.benchmark.shapes import (
    add_model_options,
    check_counts,
    device_of,
    kept_or_temporary,
    length_of,
    model_path,
    shape_names,
)
from neuronal_ray.benchmark.stages import FORWARDS, Need, Stage, needs
from neuronal_ray.benchmark.timed import (
    Setting,
    TimedSearch,
    Tokens,
    forwards_alone,
    forwards_in_parallel,
    random_tokens,
    timed_search,
    worker_of,
)
from neuronal_ray.cli.memory import peak_bytes
from neuronal_ray.cli.parser import Parser
from neuronal_ray.models.checkpoint import empty_model
from neuronal_ray.workers.footprint import GIB, Footprint, Work
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.tasks.candidates import pass_together, trial
from neuronal_ray.workers.tasks.parallel import InParallel, parallel_tasks
from neuronal_ray.workers.tasks.statistics import device_name, observe
from neuronal_ray.workers.worker import Worker

_DESCRIPTION = """Time NeuronAL's search in `paper` mode (the dense pass over the calibration text, ranking, 14 block
and 15 row candidates) on a model of any size, stage by stage. Its lower bounds, and a literal implementation that sorts
again and runs dense and sparse weights for every lambda, as the released code does, are measured in the same run.
Weights are random, except for the built-in model's: the search does the same work. Example:
neuronal-ray benchmark search --shape 7b --dtype bfloat16 --checkpoints /scratch --output search.json"""
_DEFAULT = "builtin,wide"


@dataclass(frozen=True, kw_only=True)
class Literal:
    """The time of a literal candidate over one of ours, which includes its share of the dense pass and the ranking.

    `all_statistics`: with the mean and the variance that the released hooks take as well. Medians of `candidates`.
    """

    candidates: int
    ratio: float
    all_statistics: float


@dataclass(frozen=True, kw_only=True)
class SearchMeasured:
    """One model's search. `search_s` is all after loading; `candidates` counts the distinct ones among `tried`.

    `staged_s` is the sum of the stages; on a GPU they come from a second run, which waits for the device at each.
    `forwards_alone_s`: the candidates' forwards with weights masked before, nothing observed, one after the other;
    `forwards_in_parallel_s`: as many in parallel as in the search (workers/thread_lanes.py). `floor_s`: the operations
    of their matrix products at the device's ceiling. `formula_bytes`: the planner's estimate.
    """

    name: str
    device: str
    dtype: str
    blocks: int
    prunable: int
    samples: int
    length: int
    calibration_samples: int
    offload: bool
    tried: int
    candidates: int
    load_s: float
    search_s: float
    candidates_s: float
    stages: tuple[Stage, ...]
    staged_s: float
    forwards_alone_s: float
    forwards_in_parallel_s: float
    floor_s: float
    ceilings: Ceilings
    token_forwards: float
    device_bytes: int | None
    host_bytes: int
    formula_bytes: int
    literal: Literal | None

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
        memory = "" if self.device_bytes is None else f"device {self.device_bytes / GIB:.2f} GiB, "
        rows = [
            f"{self.name} ({self.dtype}, {self.device}): {self.blocks} blocks of {self.prunable / 1e6:,.0f} M prunable "
            f"weights in all, {self.samples} x {self.length} search tokens{', blocks offloaded' * self.offload}",
            f"  ceilings: {self.ceilings}",
            *(stage.line(self.staged_s, self.ceilings) for stage in self.stages),
            f"  {'load':<28} {self.load_s:9.2f} s",
            f"  {'search':<28} {self.search_s:9.2f} s   {self.candidates} distinct candidates of {self.tried}, "
            f"{self.token_forwards / self.search_s:,.0f} token-forwards/s",
            f"  {'sparse forwards alone':<28} {self.forwards_alone_s:9.2f} s   candidates / forwards alone = "
            f"{self.candidates_s / self.forwards_alone_s:.2f}, search / forwards alone = "
            f"{self.search_s / self.forwards_alone_s:.2f}",
            f"  {'the same, in parallel':<28} {self.forwards_in_parallel_s:9.2f} s   search / forwards = "
            f"{self.search_s / self.forwards_in_parallel_s:.2f}",
            f"  {'arithmetic floor':<28} {self.floor_s:9.2f} s   search / floor = {self.search_s / self.floor_s:.2f}",
            f"  peak memory: {memory}host {self.host_bytes / GIB:.2f} GiB; planner's formula "
            f"{self.formula_bytes / GIB:.2f} GiB",
        ]
        if self.literal is not None:
            rows += [
                f"  {'literal / search':<28} {self.literal.ratio:9.2f}     median of {self.literal.candidates}, each "
                "timed next to one of ours",
                f"  {'released / search':<28} {self.literal.all_statistics:9.2f}     the literal one with the mean and "
                "variance that the released hooks take too",
            ]
        return rows


def main(argv: Sequence[str]) -> None:
    """Measure the given shapes one after the other."""
    parser = Parser(prog="neuronal-ray benchmark search", description=_DESCRIPTION)
    add_model_options(parser, shape=_DEFAULT)
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="search sequences (default: 8)")
    parser.add_argument("--length", type=int, metavar="N", help="tokens of each (default: 2048; builtin 256, wide 512)")
    parser.add_argument(
        "--calibration-samples",
        type=int,
        metavar="N",
        help="sequences for the scores, of which the search takes the first (default: --samples)",
    )
    parser.add_argument(
        "--offload", action="store_true", help="keep the weights on the host, with one block at a time on the device"
    )
    parser.add_argument(
        "--literal-candidates",
        type=int,
        default=3,
        metavar="N",
        help="candidates of the literal search (default: 3); none with 0 or --offload",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        metavar="N",
        help="passes for the floor, of which the median counts (default: 5)",
    )
    arguments = parser.parse_args(argv)
    names, device = shape_names(arguments.shape), device_of(arguments.device)
    check_counts(arguments, samples=1, length=2, calibration_samples=arguments.samples, repeats=1)
    check_counts(arguments, literal_candidates=0, threads=1)
    check_figures(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    print(machine(), flush=True)
    results = []
    with kept_or_temporary(arguments.checkpoints) as folder:
        for name in names:
            setting = Setting(
                name=name,
                path=model_path(name, folder, blocks=arguments.blocks),
                device=device,
                dtype=arguments.dtype,
                samples=arguments.samples,
                length=arguments.length or length_of(name),
                calibration_samples=arguments.calibration_samples or arguments.samples,
                threads=arguments.threads,
                offload=arguments.offload,
            )
            literal = 0 if arguments.offload else arguments.literal_candidates
            results.append(measure_search(setting, repeats=arguments.repeats, literal_candidates=literal))
            print("\n".join(results[-1].lines()), flush=True)
            publish(results, arguments.output)


def measure_search(setting: Setting, *, repeats: int, literal_candidates: int) -> SearchMeasured:
    """Time loading and the search, then the floors and the literal candidates."""
    device = torch.device(setting.device)
    forget_peak(device)
    begin = time.perf_counter()
    pool = InProcessPool(setting.spec)
    settle(device)
    load_s = time.perf_counter() - begin
    worker = worker_of(pool)
    tokens = random_tokens(setting, worker)
    observe(worker, tokens[:1])  # warm up

    search = staged = timed_search(setting, pool, tokens, quiet=False)
    if device.type == "cuda":  # the stages of a run that waits for the device at each
        worker.stopwatch.synchronize = True
        staged = timed_search(setting, pool, tokens, quiet=False)
        worker.stopwatch.synchronize = False
    device_bytes, host_bytes = device_peak(device), peak_bytes()

    text, layout, dtype = tokens[: setting.samples], worker.layout, worker.replica.stream.model.dtype
    alone_s = forwards_alone(worker, text, search.plans[-1], repeats=repeats) * search.distinct
    parallel_s = alone_s  # where nothing runs in parallel
    if parallel_tasks(worker) > 1:
        parallel_s = forwards_in_parallel(worker, text, search.plans[-1], repeats=repeats) * search.distinct
    literal = _literal(worker, text, search, literal_candidates) if literal_candidates else None
    ceilings = measure_ceilings(device, dtype)
    need = needs(
        layout,
        tokens=text.numel(),
        calibration_tokens=tokens.numel(),
        candidates=search.distinct,
        item=dtype.itemsize,
        rankings=2 if setting.offload else 1,  # in each step
    )
    work = Work(item=dtype.itemsize, held=text.numel(), device=device.type)
    footprint = Footprint.of(empty_model(worker.replica.checkpoint), work)
    return SearchMeasured(
        name=setting.name,
        device=device_name(worker),
        dtype=setting.dtype,
        blocks=layout.num_blocks,
        prunable=layout.prunable,
        samples=setting.samples,
        length=setting.length,
        calibration_samples=setting.calibration_samples,
        offload=setting.offload,
        tried=search.tried,
        candidates=search.distinct,
        load_s=load_s,
        search_s=search.search_s,
        candidates_s=search.candidates_s,
        stages=tuple(Stage.of(name, spent, need.get(name, Need())) for name, spent in staged.seconds.items()),
        staged_s=staged.search_s,
        forwards_alone_s=alone_s,
        forwards_in_parallel_s=parallel_s,
        floor_s=need[FORWARDS].flops / ceilings.flops,
        ceilings=ceilings,
        token_forwards=search.distinct * text.numel() + tokens.numel(),
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        formula_bytes=footprint.offloaded() if setting.offload else footprint.worker(1),
        literal=literal,
    )


def _literal(worker: Worker, text: Tokens, search: TimedSearch, candidates: int) -> Literal:
    """Time each literal candidate next to as many of ours as run in parallel, with the plans of both steps in turn."""
    inputs = [worker.replica.stream.start(part) for part in text.to(worker.device).split(1)]
    shared_s = (search.search_s - search.candidates_s) / search.distinct
    ratios: dict[bool, list[float]] = {False: [], True: []}
    for number in range(candidates):
        plan = search.plans[number % 2]
        ours_s = search.candidates_s / search.distinct
        if not pass_together(worker):
            plans = [plan] * parallel_tasks(worker)
            ours_s = seconds(worker.device, partial(InParallel(trial), worker, plans)) / len(plans)
        for all_statistics, measured in ratios.items():
            call = partial(literal_candidate, worker, inputs, plan, all_statistics=all_statistics)
            measured.append(seconds(worker.device, call) / (ours_s + shared_s))
    return Literal(candidates=candidates, ratio=median(ratios[False]), all_statistics=median(ratios[True]))
