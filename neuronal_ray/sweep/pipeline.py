"""Running a sweep: cells in an order in which they share most, each result noted when it comes.

Per model one pool, one dense evaluation; per calibration text one dense pass; per method one ranking; equal candidates
of a search once. Candidates, windows and benchmarks are spread over the pool. A cell that fails is noted, and the
others go on.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from time import perf_counter

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.cli.versions import versions
from neuronal_ray.core.layout import Layout
from neuronal_ray.evaluate.benchmark_names import MEAN, ZERO_SHOT
from neuronal_ray.evaluate.measure import Evaluations, measured
from neuronal_ray.evaluate.scores import PERPLEXITY, Score, mean_score
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.inputs import Inputs, Reader, held_tokens
from neuronal_ray.prune.pipeline import plan_run
from neuronal_ray.prune.session import Session, digest_of
from neuronal_ray.sweep.config import Cell, Study
from neuronal_ray.sweep.files import DENSE, Planned, Row, Store
from neuronal_ray.workers.pools.launch import check_device, open_pool
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.tasks.statistics import device_name, peak_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A cell with everything that can be read and checked before any weight is loaded."""

    cell: Cell
    inputs: Inputs

    @property
    def place(self) -> tuple[object, ...]:
        """Cells of one place share a pool."""
        config = self.cell.config
        return (
            str(self.inputs.checkpoint.path),
            config.address or "",
            config.replicas or 0,
            config.device,
            config.dtype,
            config.threads or 0,
            config.trust_remote_code,
        )

    @property
    def order(self) -> tuple[str, ...]:
        """Cells next to one another share most."""
        composition, config = self.inputs.composition, self.cell.config
        kind = composition.dense_statistic
        return (
            *map(str, self.place),
            digest_of(self.inputs.calibration),
            str(composition.released),
            repr(composition.pruner),
            "" if kind is None else kind.__name__,
            composition.criterion,
            str(config.search_samples),
            str(composition.levels),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a sweep's cells; `failed`, by id, says what they are and why."""

    finished: int
    skipped: int
    failed: dict[str, str]


def prepare_study(study: Study) -> list[Ready]:
    """Check every cell and read every text, each once. Raises BadInput that names the cell."""
    reader = Reader()
    ready = []
    for cell in study.cells:
        try:
            check_device(cell.config)
            ready.append(Ready(cell=cell, inputs=reader.prepare(cell.config)))
        except BadInput as error:
            raise BadInput(f"cell {cell}: {error}") from error
    return sorted(ready, key=lambda one: one.order)


def run_study(cells: Sequence[Ready], store: Store, progress: Progress) -> Outcome:
    """Run what is not done yet."""
    waiting = [one for one in cells if store.done(one.cell.id) < _expected(one.inputs.evaluations)]
    failed: dict[str, str] = {}
    with progress.stage("cells", len(waiting)) as advance:
        for _, group in groupby(waiting, key=lambda one: one.place):
            members = list(group)
            try:
                widest = max(members, key=lambda one: held_tokens(one.cell.config, one.inputs))
                with open_pool(
                    widest.cell.config,
                    widest.inputs.checkpoint,
                    pruner=widest.inputs.composition.pruner,
                    held=held_tokens(widest.cell.config, widest.inputs),
                ) as pool:
                    failed |= _Group(pool, members, store).run(advance)
            except (ValueError, RuntimeError) as error:  # the model cannot be loaded, or its workers are gone
                left = [one for one in members if store.done(one.cell.id) < _expected(one.inputs.evaluations)]
                for one in left:
                    failed.setdefault(one.cell.id, f"{one.cell}: {_first_line(error)}")
    finished = sum(store.done(one.cell.id) >= _expected(one.inputs.evaluations) for one in waiting)
    return Outcome(finished=finished, skipped=len(cells) - len(waiting), failed=failed)


def _expected(evaluations: Evaluations) -> set[str]:
    return {*evaluations.names, *([MEAN] if set(ZERO_SHOT) <= set(evaluations.benchmarks) else [])}


class _Group:
    """The cells of one place on their pool."""

    def __init__(self, pool: Pool, members: Sequence[Ready], store: Store) -> None:
        self._pool, self._members, self._store = pool, members, store
        self._wanted = self._wanted_statistics()
        self._session = self._fresh()
        self._layout: Layout = self._session.layout()
        self._device = self._pool.first(device_name)
        self._versions = json.dumps(versions())

    def run(self, advance: Callable[[str], None]) -> dict[str, str]:
        """Run every cell; those that failed, by id, with why."""
        failed: dict[str, str] = {}
        for one in self._members:
            begin = perf_counter()
            try:
                self._run_dense(one)
                self._run_cell(one)
                note = f"{one.cell}: {perf_counter() - begin:.1f} s"
            except (ValueError, RuntimeError) as error:
                note = failed[one.cell.id] = f"{one.cell}: {_first_line(error)}"
                logger.warning("failed: %s", note)
                self._session = self._fresh()
            advance(note)
        return failed

    def _fresh(self) -> Session:
        return Session(self._pool, wanted=self._wanted)

    def _wanted_statistics(self) -> dict[str, tuple[type, ...]]:
        wanted: dict[str, dict[type, None]] = {}
        for one in self._members:
            kind = one.inputs.composition.dense_statistic
            if kind is not None and not one.inputs.composition.released:
                wanted.setdefault(digest_of(one.inputs.calibration), {})[kind] = None
        return {text: tuple(kinds) for text, kinds in wanted.items()}

    def _run_dense(self, one: Ready) -> None:
        """The dense model on what the cell is evaluated on, once per model and evaluation."""
        evaluations = one.inputs.evaluations
        cell = self._dense_id(one)
        missing = evaluations.without(self._store.done(cell))
        if missing.names:
            blank = Planned(plan=None, steps=(), seconds=0.0, search_seconds=0.0)
            for name, score, seconds in self._scored(missing, blank, "dense"):
                self._store.keep(self._row(one, blank, name, score, seconds, cell=cell))
            self._keep_mean(one, blank, cell=cell)
            self._store.publish(cell)

    def _run_cell(self, one: Ready) -> None:
        inputs, cell = one.inputs, one.cell.id
        planned = self._store.planned(cell, self._layout)
        quiet = Progress(quiet=True)
        if planned is None:
            planned = self._plan(one, quiet)
        else:
            self._session.hold(inputs.composition, inputs.calibration, quiet, samples=one.cell.config.search_samples)
        assert planned.plan is not None
        self._session.settle(inputs.composition, planned.plan, inputs.calibration, quiet)
        planned = replace(planned, seconds=planned.seconds + quiet.seconds.get("refinement", 0.0))
        missing = inputs.evaluations.without(self._store.done(cell))
        for name, score, seconds in self._scored(missing, planned, "pruned"):
            self._store.keep(self._row(one, planned, name, score, seconds, cell=cell))
        self._keep_mean(one, planned, cell=cell)
        self._store.publish(cell)

    def _plan(self, one: Ready, progress: Progress) -> Planned:
        begin = perf_counter()
        inputs = one.inputs
        found = plan_run(one.cell.config, inputs.composition, self._session, inputs.calibration, progress)
        steps = [
            {
                "name": step.name,
                "selected": step.selected,
                "lambdas": list(step.lambdas),
                "scores": [score if math.isfinite(score) else None for score in step.scores],
            }
            for step in found.allocation.steps
        ]
        searched = sum(seconds for stage, seconds in progress.seconds.items() if stage.endswith("search"))
        method = sum(progress.seconds.get(stage, 0.0) for stage in ("statistics", "ranking"))
        spared = found.search.spared_s
        planned = Planned(
            plan=found.allocation.plan,
            steps=steps,
            seconds=perf_counter() - begin - method + spared,
            search_seconds=searched + spared,
        )
        self._store.keep_plan(one.cell.id, self._layout, planned)
        return planned

    def _scored(self, evaluations: Evaluations, planned: Planned, label: str) -> Iterator[tuple[str, Score, float]]:
        begin = perf_counter()
        for name, score in measured(self._pool, evaluations, planned.plan, Progress(quiet=True), label=label):
            yield name, score, perf_counter() - begin
            begin = perf_counter()

    def _keep_mean(self, one: Ready, planned: Planned, *, cell: str) -> None:
        """The mean over the paper's seven tasks, once all are there."""
        rows = [self._store.rows.get((cell, name)) for name in ZERO_SHOT]
        known = [row for row in rows if row is not None]
        if len(known) < len(ZERO_SHOT) or (cell, MEAN) in self._store.rows:
            return
        self._store.keep(self._row(one, planned, MEAN, mean_score([_score_of(row) for row in known]), 0.0, cell=cell))

    def _dense_id(self, one: Ready) -> str:
        """Names the dense model under all that its scores depend on."""
        config, settings = one.cell.config, one.inputs.evaluations.settings
        only = PruneConfig(
            model=config.model,
            dtype=config.dtype,
            sequence_length=one.inputs.sequence_length,
            few_shot=settings.few_shot,
            task_limit=settings.limit,
            task_data=settings.data,
        )
        return f"{DENSE}-{Cell(variant=DENSE, config=only).id}"

    def _row(self, one: Ready, planned: Planned, name: str, score: Score, seconds: float, *, cell: str) -> Row:
        config, composition = one.cell.config, one.inputs.composition
        dense = planned.plan is None
        selected = {step["name"]: float(step["selected"]) for step in planned.steps}
        finite = math.isfinite(score.value)
        known = self._store.rows.get((self._dense_id(one), name))
        reference = score if dense else None if known is None else _score_of(known)
        return Row(
            cell=cell,
            variant=DENSE if dense else one.cell.variant,
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
            sequence_length=one.inputs.sequence_length,
            block_lambda=selected.get("block"),
            row_lambda=selected.get("row"),
            evaluation=name,
            metric=score.metric,
            value=score.value if finite else None,
            error=None if math.isnan(score.error) else score.error,
            rows=score.rows,
            dense=None if reference is None or not math.isfinite(reference.value) else reference.value,
            seconds=planned.seconds,
            search_seconds=planned.search_seconds,
            evaluation_seconds=seconds,
            peak_bytes=max(self._pool.each(peak_memory)),
            device=self._device,
            problem=None if finite else "overflow",
            config=json.dumps(one.cell.options(), default=str),
            versions=self._versions,
        )


def _score_of(row: Row) -> Score:
    return Score(
        metric=row.metric,
        value=math.inf if row.value is None else row.value,
        error=math.nan if row.error is None else row.error,
        rows=row.rows,
        length=row.sequence_length if row.metric == PERPLEXITY else None,
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
