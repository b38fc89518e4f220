"""What the workers of one model hold: each thing is gathered once and stays until another takes its place.

A single run and a sweep of many runs need the same things; a sweep orders its runs so that little is repeated.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.progress import Progress
from neuronal_ray.cli.versions import score_versions
from neuronal_ray.core.input_zeros import row_zeros
from neuronal_ray.core.layout import Group, Layout, Linear
from neuronal_ray.core.plan import Counts, Plan
from neuronal_ray.core.stats import RunningNorm, Statistic
from neuronal_ray.prune.compose import Composition
from neuronal_ray.prune.journal import Journal
from neuronal_ray.prune.results import Results
from neuronal_ray.prune.search import Search
from neuronal_ray.workers.pools.protocol import Pool, map_in_parallel
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.tasks import final_model, probes
from neuronal_ray.workers.tasks import statistics as dense

logger = logging.getLogger(__name__)

Tokens = Int64[Tensor, "samples length"]
Statistics = dict[Group, Statistic]


def digest_of(tokens: Tokens) -> str:
    """Return a digest that is equal for equal sequences only."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Observed:
    """The text and the kind of dense statistics, and whether they are the released code's."""

    text: str
    kind: type[Statistic]
    released: bool


@dataclass(frozen=True)
class _Ranked:
    """What the rankings on the workers come from."""

    pruner: LinearPruner
    observed: _Observed | None
    text: str


@dataclass(frozen=True)
class _Query:
    """What the results of a search depend on besides the plan."""

    ranked: _Ranked
    samples: int
    criterion: str
    released: bool
    levels: int
    target: float


@dataclass
class Session:
    """Statistics are kept by the driver: vectors of one number per input feature.

    `wanted` are, by digest of a calibration text, the kinds of statistics that later runs need too: they are gathered
    in the same dense pass. `journal` is the folder where finished candidates are kept, and read by a later run.
    """

    pool: Pool
    wanted: dict[str, tuple[type[Statistic], ...]] = field(default_factory=dict)
    journal: Path | None = None
    _statistics: dict[_Observed, Statistics] = field(default_factory=dict)
    _of_search_text: dict[tuple[_Observed, int], Statistics] = field(default_factory=dict)
    _ranked: _Ranked | None = None
    _query: _Query | None = None
    _results: Results = field(default_factory=Results)
    _settled: bool = False
    _zeros: Counts | None = None

    def layout(self) -> Layout:
        """Return the layout of the model."""
        return self.pool.first(dense.describe)

    def zeros(self, progress: Progress) -> Counts:
        """Return the number of zeros in each row of the dense model's linears, counted once by the workers."""
        if self._zeros is None:
            found: dict[Linear, Tensor] = {}
            blocks = range(self.layout().num_blocks)
            with progress.stage("zeros of the input", len(blocks)) as advance:
                for of_block in self.pool.map(probes.measure, blocks, row_zeros):
                    found |= of_block
                    advance("")
            self._zeros = found
        return self._zeros

    def hold(self, composition: Composition, calibration: Tokens, progress: Progress, *, samples: int) -> None:
        """Bring the workers to what `composition` searches on: dense statistics, and one ranking per worker.

        A search on the first `samples` sequences will follow.
        """
        kind, pruner, text = composition.dense_statistic, composition.pruner, digest_of(calibration)
        observed = None
        if kind is not None:
            observed = _Observed(text, RunningNorm if composition.released else kind, composition.released)
            if observed not in self._statistics:
                self._gather(observed, calibration, progress, samples=samples)
        ranked = _Ranked(pruner, observed, text)
        if self._ranked == ranked:
            return
        self.pool.begin()
        self.pool.each(dense.use_pruner, pruner)
        if observed is not None:
            self.pool.each(dense.keep_statistics, self._statistics[observed])
        self._ranked, self._query, self._settled = ranked, None, False
        if composition.released or pruner.solves:
            return
        with progress.stage("ranking", 1) as advance:
            if pruner.walks:
                self.pool.each(dense.rank_on_walk, calibration)
            else:
                self.pool.each(dense.rank)
            advance("")

    def search(
        self, composition: Composition, calibration: Tokens, progress: Progress, *, samples: int, mode: str
    ) -> Search:
        """Return the search of candidates on the first `samples` calibration sequences; `hold` comes first."""
        assert self._ranked is not None, "hold comes first"
        query = _Query(
            self._ranked,
            samples,
            composition.criterion,
            composition.released,
            composition.levels,
            composition.target if composition.levels else 0.0,
        )
        if self._query != query:
            self._query, self._results = query, self._earlier_results(query, mode)
        observed = self._ranked.observed
        return Search(
            self.pool,
            layout=self.layout(),
            calibration=calibration,
            samples=samples,
            mode=mode,
            criterion=composition.criterion,
            solves=composition.pruner.solves,
            progress=progress,
            levels=composition.levels,
            target=composition.target,
            results=self._results,
            reference=None if observed is None else self._of_search_text.get((observed, samples)),
        )

    def _earlier_results(self, query: _Query, mode: str) -> Results:
        """Return the results of an earlier run of the same query on the same devices."""
        if self.journal is None:
            return Results()
        device, model = self.pool.first(dense.device_name), self.pool.first(dense.fingerprint)
        pruner = query.ranked.pruner
        question = {"search": f"{query} {mode}", "device": device, "model": model}
        journal = Journal(self.journal, score_versions(pruner.method, pruner.refinement or "") | question)
        results = Results.of(journal)
        if len(results):
            logger.warning("%d finished candidates are taken from %s", len(results), self.journal)
        elif others := journal.differences():
            logger.warning("no finished candidate is taken from %s: another %s", self.journal, ", ".join(others))
        return results

    def settle(self, composition: Composition, plan: Plan, calibration: Tokens, progress: Progress) -> None:
        """Bring the workers to the final masks, or weights, under `plan`; masks read off the ranking need no work."""
        pruner = composition.pruner
        walk = Walk(pruned=composition.pruned_stream, released=composition.released)
        if not walk.pruned and not pruner.walks and pruner.refinement is None:
            if self._settled:
                self.pool.each(final_model.unsettle)
                self._settled = False
            return
        stage = "pruned stream" if walk.pruned else "final pass" if pruner.walks else "refinement"
        with progress.stage(stage, 1) as advance:
            self.pool.each(final_model.settle, plan, calibration, walk)
            advance("")
        self._settled = True

    def _gather(self, observed: _Observed, calibration: Tokens, progress: Progress, *, samples: int) -> None:
        """Pass a calibration text through the dense model, for all kinds of statistics that are needed of it."""
        kinds = [observed.kind]
        if not observed.released:
            kinds += [kind for kind in self.wanted.get(observed.text, ()) if kind is not observed.kind]
        chunk = 1  # the released code's running mean takes single sequences
        if not observed.released:
            chunk = self.pool.first(dense.sequences_per_chunk, calibration.shape[1])
        gathered = self._merged(calibration.split(chunk), kinds, progress, first=samples)
        for kind, (first, statistics) in zip(kinds, gathered, strict=True):
            key = _Observed(observed.text, kind, observed.released)
            self._statistics[key] = statistics
            if first is not None and not observed.released:
                self._of_search_text[key, samples] = first

    def _merged(
        self, chunks: Sequence[Tokens], kinds: Sequence[type[Statistic]], progress: Progress, *, first: int
    ) -> list[tuple[Statistics | None, Statistics]]:
        """Return, for each kind, the dense model's statistics over the `first` sequences and over all chunks.

        Chunks are merged in their order. The former are None where no chunk ends after `first` sequences.
        """
        merged: list[Statistics] = [{} for _ in kinds]
        firsts: list[Statistics | None] = [None for _ in kinds]
        passed = 0
        with progress.stage("statistics", len(chunks)) as advance:
            if len(chunks) == 1:  # it has all threads
                results = self.pool.map(dense.observe_all, chunks, tuple(kinds))
            else:
                results = map_in_parallel(self.pool, dense.observe_all, chunks, tuple(kinds))
            for chunk, observed in zip(chunks, results, strict=True):
                for known, statistics in zip(merged, observed, strict=True):
                    for group, statistic in statistics.items():
                        known[group] = known[group].merge(statistic) if group in known else statistic
                passed += len(chunk)
                if passed == first:
                    firsts = [self._over(known, passed) for known in merged]
                advance("")
        return [(head, self._over(known, passed)) for head, known in zip(firsts, merged, strict=True)]

    def _over(self, statistics: Statistics, sequences: int) -> Statistics:
        """Return a copy in which the groups that tokens are routed to count as many sequences as all others."""
        routed = set(self.layout().routed)
        return statistics | {group: statistics[group].over(sequences) for group in routed & set(statistics)}
