"""The cost of allocations, refinements and solvers, compared with the dense pass and the matrix work they need."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.algorithms.methods import Quota, sparsegpt
from neuronal_ray.benchmark.literal import literal_spectrum, literal_tail_exponent
from neuronal_ray.benchmark.output import add_output, check_figures
from neuronal_ray.benchmark.record import publish
from neuronal_ray.benchmark.shapes import check_counts, device_of, kept_or_temporary, length_of, model_path
from neuronal_ray.cli.parser import Parser
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.plan import exact_plan, uniform_rates
from neuronal_ray.core.problem import Problem
from neuronal_ray.core.spectrum import BOUNDS, eigenvalues, tail_exponent
from neuronal_ray.core.stats import Gram, Moments, SquareSum
from neuronal_ray.prune.search import Search
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.spec import Walk, WorkerSpec
from neuronal_ray.workers.tasks.final_model import settle
from neuronal_ray.workers.tasks.statistics import keep_statistics, observe, rank
from neuronal_ray.workers.worker import Worker

Result = TypeVar("Result")

_REPEATS = 3
_SLAB = 128
_DEFAULT_SEQUENCES = 128  # of the calibration text


@dataclass(frozen=True, kw_only=True)
class MethodsMeasured:
    """Seconds and ratios; the bound printed after a ratio is the aim: below it, or above it for speed-ups."""

    model: str
    tokens: int
    sequences: int
    dense_pass_s: float
    allocation_s: dict[str, float]
    allocation_algebra_s: dict[str, float]
    dsnot_s: float
    dsnot_all_s: float
    spectrum_s: float
    literal_spectrum_s: float
    tail_s: dict[str, float]
    literal_tail_s: dict[str, float]
    tail_error: dict[str, float]
    sparsegpt_s: float
    sparsegpt_matrix_s: float
    gram_block_bytes: int
    gram_model_bytes: int

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
        dense, whole = self.dense_pass_s, self.dense_pass_s * _DEFAULT_SEQUENCES / self.sequences
        rows = [f"{self.model}: {self.tokens} calibration tokens", f"  dense pass                 {dense:9.3f} s"]
        for name, seconds in self.allocation_s.items():
            algebra = self.allocation_algebra_s[name]
            rows.append(
                f"  {name:<26} {seconds:9.3f} s   {algebra:.3f} s of it its own algebra; the rest / dense pass = "
                f"{(seconds - algebra) / dense:.2f} (at most 1.2)"
            )
        for bound, own in self.tail_s.items():
            literal, error = self.literal_tail_s[bound], self.tail_error[bound]
            with_spectra = (literal + self.literal_spectrum_s) / (own + self.spectrum_s)
            rows.append(
                f"  cut-offs, {bound:<16} {own:9.4f} s   literal loop / ours = {literal / own:.1f} (at least 20), "
                f"largest difference {error:.1g}; with the spectra {with_spectra:.1f}"
            )
        return [
            *rows,
            f"  dsnot, attention           {self.dsnot_s:9.3f} s   / dense pass over {_DEFAULT_SEQUENCES} sequences "
            f"(from that over {self.sequences}) = {self.dsnot_s / whole:.3f} (at most 0.1)",
            f"  dsnot, all linears         {self.dsnot_all_s:9.3f} s   / the same = {self.dsnot_all_s / whole:.3f}",
            f"  sparsegpt, a block         {self.sparsegpt_s:9.3f} s   / its matrix work = "
            f"{self.sparsegpt_s / self.sparsegpt_matrix_s:.2f} (at most 1.3)",
            f"  Gram matrices held         {self.gram_block_bytes / 2**20:9.1f} MiB, one block's; the model's would be "
            f"{self.gram_model_bytes / 2**20:.1f} MiB",
        ]


def main(argv: Sequence[str]) -> None:
    """Measure on the wide model."""
    parser = Parser(
        prog="neuronal-ray benchmark methods",
        description="Time allocations, refinements and solvers on a LLaMA of hidden size 1024, and the dense pass and "
        "the matrix work that they need.",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add_output(parser)
    arguments = parser.parse_args(argv)
    check_counts(arguments, threads=1)
    check_figures(arguments)
    with kept_or_temporary(None) as folder:
        spec = WorkerSpec(
            model_path=model_path("wide", folder),
            device=device_of("auto"),
            dtype="float32",
            pruner=LinearPruner(method="wanda"),
            threads=arguments.threads,
            trust_remote_code=False,
            profile=True,
        )
        text = torch.randint(2048, (4, length_of("wide")), generator=torch.Generator().manual_seed(0))
        measured = measure_methods(spec, text, name="wide (float32)", target=0.7)
    print("\n".join(measured.lines()), flush=True)
    publish([measured], arguments.output)


def measure_methods(
    spec: WorkerSpec, text: Int64[Tensor, "sequences length"], *, name: str, target: float
) -> MethodsMeasured:
    """Measure everything in one run; the method of `spec` needs no calibration text."""
    pool = InProcessPool(spec)
    worker = pool.first(_itself)
    layout, replica = worker.layout, worker.replica
    search = Search(pool, layout=layout, calibration=text, samples=1, mode="paper", solves=False, progress=Progress())
    problem = Problem(layout=layout, target=target, mode="paper", probe=search)

    def allocated(allocation: str) -> None:
        allocator = registry.load("allocations", allocation)
        if allocator.statistic is not None:
            pool.each(keep_statistics, observe(worker, text, SquareSum))
        allocator.allocate(problem)

    def spread_only(allocation: str) -> None:
        registry.load("allocations", allocation).allocate(problem)

    observe(worker, text)  # warm up
    dense_s, _ = _timed(partial(_dense_pass, worker, text))
    totals, algebra = {}, {}
    for allocation in ("owl", "dlp", "alphapruning"):
        totals[allocation], _ = _timed(partial(allocated, allocation))
        algebra[allocation], _ = _timed(partial(spread_only, allocation))

    pool.each(keep_statistics, observe(worker, text, Moments))
    rank(worker)
    plan = exact_plan(layout, uniform_rates(layout, lambda _: target), target=target)
    dsnot = {}
    for parts in (("attention",), ("attention", "mlp")):
        worker.kept.pruner = LinearPruner(method="wanda", refinement="dsnot", parts=parts)
        dsnot[parts], _ = _timed(partial(settle, worker, plan, text, Walk(pruned=False)))

    weights = [replica.weight(spec) for spec in layout.blocks[0]]
    spectrum_s, spectra = _timed(lambda: [eigenvalues(weight) for weight in weights])
    literal_spectrum_s, _ = _timed(lambda: [literal_spectrum(weight) for weight in weights])
    tail_s, literal_tail_s, tail_error = {}, {}, {}
    for bound in BOUNDS:
        tail_s[bound], own = _timed(partial(_tails, spectra, bound))
        literal_tail_s[bound], literal = _timed(partial(_literal_tails, spectra, bound))
        tail_error[bound] = max(abs(a - b) for a, b in zip(own, literal, strict=True) if a is not None)

    _, recordings = replica.start(text)
    _, (grams,) = replica.run(0, recordings, (Gram,))
    quotas = {spec.linear: Quota(removed=int(plan.removed[spec.linear].sum())) for spec in layout.blocks[0]}

    def solved() -> None:
        factors = {group: sparsegpt.factorize(grams[group]) for group in grams}
        for spec in layout.blocks[0]:
            sparsegpt.solve(replica.weight(spec), factors[spec.reads], quotas[spec.linear])

    def matrix_work() -> None:
        for group, gram in grams.items():
            assert isinstance(gram, Gram)
            upper = _factor_chain(gram.total)
            for spec in layout.groups[group]:
                _slab_products(replica.weight(spec).float().t().contiguous(), upper)

    return MethodsMeasured(
        model=name,
        tokens=text.numel(),
        sequences=len(text),
        dense_pass_s=dense_s,
        allocation_s=totals,
        allocation_algebra_s=algebra,
        dsnot_s=dsnot["attention",],
        dsnot_all_s=dsnot["attention", "mlp"],
        spectrum_s=spectrum_s,
        tail_s=tail_s,
        literal_spectrum_s=literal_spectrum_s,
        literal_tail_s=literal_tail_s,
        tail_error=tail_error,
        sparsegpt_s=_timed(solved)[0],
        sparsegpt_matrix_s=_timed(matrix_work)[0],
        gram_block_bytes=max(
            sum(4 * first.columns**2 for first in layout.first_readers(block).values())
            for block in range(layout.num_blocks)
        ),
        gram_model_bytes=sum(4 * specs[0].columns ** 2 for specs in layout.groups.values()),
    )


def _itself(worker: Worker) -> Worker:
    return worker


def _tails(spectra: list[Tensor], bound: str) -> list[float | None]:
    return [tail_exponent(spectrum, bound=bound) for spectrum in spectra]


def _literal_tails(spectra: list[Tensor], bound: str) -> list[float]:
    return [literal_tail_exponent(spectrum, compat=bound == "compat") for spectrum in spectra]


def _dense_pass(worker: Worker, text: Int64[Tensor, "sequences length"]) -> None:
    """Pass the text through all blocks without observing anything."""
    _, recordings = worker.replica.start(text)
    for index in range(worker.layout.num_blocks):
        recordings, _ = worker.replica.run(index, recordings)


def _timed(call: Callable[[], Result]) -> tuple[float, Result]:
    """Return the median seconds of a few calls, and the last result."""
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - begin)
    return median(seconds), result


def _factor_chain(gram: Tensor) -> Tensor:
    """Do two Cholesky factorizations and an inverse of a matrix of the Hessian's size."""
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def _slab_products(work: Tensor, upper: Tensor) -> None:
    """Do the products of a sweep: rank-1 updates inside each slab, then the slab's update of all later columns."""
    columns = len(work)
    for first in range(0, columns, _SLAB):
        last = min(first + _SLAB, columns)
        errors = work[first:last].clone()
        for column in range(first, last):
            work[column + 1 : last] -= upper[column, column + 1 : last, None] * errors[column - first]
        work[last:].addmm_(upper[first:last, last:].t(), errors, alpha=-1)
