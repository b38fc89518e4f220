"""A sweep from top to bottom: cells in an order in which they share most, each result noted as soon as it is known.

Per model one pool and one dense evaluation; per calibration text one dense pass; per method one ranking; equal
candidates of a search once. Candidates, windows and benchmarks are spread over the pool. A cell that fails is reported,
and the others go on.
"""

import json
import logging
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from time import perf_counter

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.exit_codes import Unfinished
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.layout import Layout
from neuronal_ray.data.window_start import BOS
from neuronal_ray.evaluate.benchmark_names import MEAN, ZERO_SHOT
from neuronal_ray.evaluate.measure import Evaluations, measured
from neuronal_ray.evaluate.scores import PERPLEXITY, Score, mean_score
from neuronal_ray.prune.compose import Composition, compose
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.inputs import Reader, held_tokens
from neuronal_ray.prune.pipeline import plan_run
from neuronal_ray.prune.session import Session, digest_of
from neuronal_ray.prune.window_start import with_window_start
from neuronal_ray.report.schemas import DENSE, Result
from neuronal_ray.sweep.config import Cell
from neuronal_ray.sweep.files import Planned, SearchedStep, Store
from neuronal_ray.sweep.inputs import Ready
from neuronal_ray.workers.pools.launch import open_pool
from neuronal_ray.workers.pools.protocol import Pool, TaskError
from neuronal_ray.workers.tasks.statistics import device_name, peak_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Numbers of cells that were finished, or were done before; `failed` by id has a line for each that failed."""

    finished: int
    skipped: int
    failed: dict[str, str]


def run_study(cells: Sequence[Ready], store: Store, reader: Reader, progress: Progress) -> Outcome:
    """Run the cells that lack a result; `reader` has read their texts."""

    def unfinished(members: Sequence[Ready]) -> list[Ready]:
        return [ready for ready in members if not _is_finished(ready, store)]

    store.warn_of_other_code({ready.cell.id: ready.versions["neuronal_ray"] for ready in cells})
    waiting = unfinished(cells)
    failed: dict[str, str] = {}
    with progress.stage("cells", len(waiting)) as advance:
        for _, group in groupby(waiting, key=lambda ready: ready.place):
            members = list(group)
            widest = max(members, key=lambda ready: held_tokens(ready.cell.config, ready.inputs))
            try:
                with open_pool(
                    widest.cell.config,
                    widest.inputs.checkpoint,
                    pruner=widest.inputs.composition.pruner,
                    held=held_tokens(widest.cell.config, widest.inputs),
                ) as pool:
                    failed |= _Group(pool, members, store, reader).run(advance)
            except Exception as error:  # the model cannot be loaded, or its workers are gone
                reason = _report_failure(f"the cells of {widest.cell.config.model}", error)
                for ready in unfinished(members):
                    failed.setdefault(ready.cell.id, f"{ready.cell}: {reason}")
    return Outcome(finished=len(waiting) - len(unfinished(waiting)), skipped=len(cells) - len(waiting), failed=failed)


def _is_finished(ready: Ready, store: Store) -> bool:
    """Tell whether a cell has all its results, and its plan where other cells need it."""
    planned = store.is_planned(ready.cell.id) or not ready.sets_budget
    return planned and store.done(ready.cell.id) >= ready.expected


def _report_failure(what: str, error: Exception) -> str:
    """Log a failure, with its traceback if the error is internal, and return it in one line."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, BadInput | Unfinished | OSError) or (isinstance(error, TaskError) and not _is_internal(error)):
        line = " ".join(" ".join(lines).split())
        logger.error("%s failed: %s", what, line)
        return line
    chain = '  File "' not in str(error)  # else the text has the traceback of the other process
    trace = "".join(traceback.format_exception(error, chain=chain)).rstrip()
    logger.error("%s failed by an internal error:\n%s", what, trace)
    return " ".join(["internal error:", f"{type(error).__name__}:", lines[0], *lines[1:][-1:]])


def _is_internal(error: TaskError) -> bool:
    """Tell whether a task failed by a fault of ours: not by a lost worker, nor by a full disk."""
    return error.__cause__ is not None and not isinstance(error.__cause__, OSError)


class _Group:
    """The cells that share a pool, run one after the other."""

    def __init__(self, pool: Pool, members: Sequence[Ready], store: Store, reader: Reader) -> None:
        self._pool, self._members, self._store, self._reader = pool, members, store, reader
        self._wanted: dict[str, tuple[type, ...]] = {}
        self._session = self._fresh()
        self._layout: Layout = self._session.layout()
        self._device = self._pool.first(device_name)

    def run(self, advance: Callable[[str], None]) -> dict[str, str]:
        """Run every cell; return the reasons of those that failed, by id."""
        failed: dict[str, str] = {}
        members = []
        quiet, decided = Progress(quiet=True), self._store.path / "decided"
        for ready in self._members:
            config, inputs = ready.cell.config, ready.inputs
            try:
                inputs = with_window_start(config, inputs, self._pool, self._reader, quiet, journal=decided)
                members.append(replace(ready, inputs=inputs, text=digest_of(inputs.calibration)))
            except Exception as error:  # reported, and the other cells go on
                failed[ready.cell.id] = f"{ready.cell}: {_report_failure(str(ready.cell), error)}"
                advance(failed[ready.cell.id])
        self._wanted = self._wanted_statistics(members)
        self._session = self._fresh()
        for ready in members:
            begin = perf_counter()
            try:
                self._run_dense(ready)
                self._run_cell(ready)
                note = f"{ready.cell}: {perf_counter() - begin:.1f} s"
            except Exception as error:  # reported, and the other cells go on
                note = failed[ready.cell.id] = f"{ready.cell}: {_report_failure(str(ready.cell), error)}"
                self._session = self._fresh()
            advance(note)
        return failed

    def _fresh(self) -> Session:
        return Session(self._pool, wanted=self._wanted)

    def _wanted_statistics(self, members: Sequence[Ready]) -> dict[str, tuple[type, ...]]:
        wanted: dict[str, dict[type, None]] = {}
        for ready in members:
            kind = ready.inputs.composition.dense_statistic
            if kind is not None and not ready.inputs.composition.released:
                wanted.setdefault(ready.text, {})[kind] = None
        return {text: tuple(kinds) for text, kinds in wanted.items()}

    def _run_dense(self, ready: Ready) -> None:
        """Evaluate the dense model on the texts and benchmarks of the cell, once per model and evaluation."""
        evaluations = ready.inputs.evaluations
        cell = self._dense_id(ready)
        missing = evaluations.without(self._store.done(cell))
        if missing.names:
            blank = Planned(plan=None, steps=(), seconds=0.0, search_seconds=0.0)
            for name, score, seconds in self._scored(missing, blank, "dense"):
                self._store.keep(self._row(ready, blank, name, score, seconds, cell=cell))
            self._keep_mean(ready, blank, cell=cell)
            self._store.publish(cell)

    def _run_cell(self, ready: Ready) -> None:
        cell, calibration, quiet = ready.cell.id, ready.inputs.calibration, Progress(quiet=True)
        budget, config, composition = self._with_budget(ready)
        planned = self._store.planned(cell, self._layout)
        if planned is None:
            planned = self._plan(ready, config, composition, quiet)
        else:
            self._session.hold(composition, calibration, quiet, samples=config.search_samples)
        assert planned.plan is not None
        if budget is not None and planned.plan.total != budget:
            raise Unfinished(f"its plan removes {planned.plan.total} weights, expected {budget} (equal-budgets)")
        self._session.settle(composition, planned.plan, calibration, quiet)
        planned = replace(planned, seconds=planned.seconds + quiet.seconds.get("refinement", 0.0))
        missing = ready.inputs.evaluations.without(self._store.done(cell))
        for name, score, seconds in self._scored(missing, planned, "pruned"):
            self._store.keep(self._row(ready, planned, name, score, seconds, cell=cell))
        self._keep_mean(ready, planned, cell=cell)
        self._store.publish(cell)

    def _with_budget(self, ready: Ready) -> tuple[int | None, PruneConfig, Composition]:
        """Return the number of weights to remove, None for the configured sparsity, and the run that removes them."""
        config, composition = ready.cell.config, ready.inputs.composition
        if ready.cell.budget_of is None:
            return None, config, composition
        reference = self._store.planned(ready.cell.budget_of, self._layout)
        if reference is None or reference.plan is None:
            raise Unfinished("the cell that sets its budget has no plan (equal-budgets)")
        config = replace(config, sparsity=reference.plan.total / self._layout.prunable)
        return reference.plan.total, config, compose(config)

    def _plan(self, ready: Ready, config: PruneConfig, composition: Composition, progress: Progress) -> Planned:
        begin = perf_counter()
        found = plan_run(config, composition, self._session, ready.inputs.calibration, progress)
        steps = tuple(
            SearchedStep(
                name=step.name,
                selected=step.selected,
                lambdas=step.lambdas,
                scores=tuple(score if math.isfinite(score) else None for score in step.scores),
            )
            for step in found.allocation.steps
        )
        searched = sum(seconds for stage, seconds in progress.seconds.items() if stage.endswith("search"))
        method = sum(progress.seconds.get(stage, 0.0) for stage in ("statistics", "ranking"))
        spared = found.search.spared_s
        planned = Planned(
            plan=found.allocation.plan,
            steps=steps,
            seconds=perf_counter() - begin - method + spared,
            search_seconds=searched + spared,
        )
        self._store.keep_plan(ready.cell.id, self._layout, planned)
        return planned

    def _scored(self, evaluations: Evaluations, planned: Planned, label: str) -> Iterator[tuple[str, Score, float]]:
        begin = perf_counter()
        for name, score in measured(self._pool, evaluations, planned.plan, Progress(quiet=True), label=label):
            yield name, score, perf_counter() - begin
            begin = perf_counter()

    def _keep_mean(self, ready: Ready, planned: Planned, *, cell: str) -> None:
        """Note the mean over the paper's seven tasks, once all have a result."""
        rows = [self._store.rows.get((cell, name)) for name in ZERO_SHOT]
        known = [row for row in rows if row is not None]
        if len(known) < len(ZERO_SHOT) or (cell, MEAN) in self._store.rows:
            return
        self._store.keep(self._row(ready, planned, MEAN, mean_score([_score_of(row) for row in known]), 0.0, cell=cell))

    def _dense_id(self, ready: Ready) -> str:
        """Return the id of the dense model with every setting that its scores depend on."""
        config, settings = ready.cell.config, ready.inputs.evaluations.settings
        only = PruneConfig(
            model=config.model,
            dtype=config.dtype,
            sequence_length=ready.inputs.sequence_length,
            few_shot=settings.few_shot,
            task_limit=settings.limit,
            task_data=settings.data,
            window_start=BOS if ready.inputs.window_start.used == BOS else None,
        )
        return f"{DENSE}-{Cell(variant=DENSE, config=only).id}"

    def _row(self, ready: Ready, planned: Planned, name: str, score: Score, seconds: float, *, cell: str) -> Result:
        config, composition = ready.cell.config, ready.inputs.composition
        dense = planned.plan is None
        selected = {step.name: step.selected for step in planned.steps}
        finite = math.isfinite(score.value)
        known = self._store.rows.get((self._dense_id(ready), name))
        reference = score if dense else None if known is None else _score_of(known)
        return Result(
            cell=cell,
            variant=DENSE if dense else ready.cell.variant,
            model=config.model,
            method=DENSE if dense else config.method,
            allocation=DENSE if dense else composition.allocation,
            row_step=None if dense else composition.row_step,
            refinement="none" if dense else config.refinement,
            pattern="unstructured" if dense else config.pattern,
            mode=config.mode,
            criterion=composition.criterion,
            sparsity=0.0 if dense else composition.target,
            achieved=0.0 if planned.plan is None else planned.plan.total / self._layout.prunable,
            seed=config.seed,
            calibration=config.calibration,
            calibration_samples=config.calibration_samples,
            search_samples=config.search_samples,
            sequence_length=ready.inputs.sequence_length,
            block_lambda=selected.get("block"),
            row_lambda=selected.get("row"),
            evaluation=name,
            metric=score.metric,
            value=score.value if finite else None,
            error=None if math.isnan(score.error) else score.error,
            rows=score.rows,
            window_start=score.window_start,
            dense=None if reference is None or not math.isfinite(reference.value) else reference.value,
            seconds=planned.seconds,
            search_seconds=planned.search_seconds,
            evaluation_seconds=seconds,
            peak_bytes=max(self._pool.each(peak_memory)),
            device=self._device,
            problem=None if finite else "overflow",
            config=json.dumps(ready.cell.options(), default=str),
            versions=json.dumps(ready.versions),
        )


def _score_of(row: Result) -> Score:
    return Score(
        metric=row.metric,
        value=math.inf if row.value is None else row.value,
        error=math.nan if row.error is None else row.error,
        rows=row.rows,
        length=row.sequence_length if row.metric == PERPLEXITY else None,
        window_start=row.window_start,
    )
