"""What the workers of one model hold at the moment: each thing is gathered once, until another takes its place.

A single run and a sweep of many ask the same questions; a sweep asks them in an order that repeats little.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.progress import Progress
from neuronal_ray.cli.versions import score_versions
from neuronal_ray.core.layout import Group, Layout
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import RunningNorm, Statistic
from neuronal_ray.prune.compose import Composition
from neuronal_ray.prune.journal import Journal
from neuronal_ray.prune.search import Answers, Search
from neuronal_ray.workers.pools.protocol import Pool, map_side_by_side
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.worker import Worker

logger = logging.getLogger(__name__)

Tokens = Int64[Tensor, "samples length"]
Gathered = dict[Group, Statistic]


def digest_of(tokens: Tokens) -> str:
    """Equal for equal sequences only."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class _Seen:
    """Which text dense statistics are of, and whether they are the released code's."""

    text: str
    kind: type[Statistic]
    released: bool


@dataclass(frozen=True)
class _Ranked:
    """What the rankings on the workers come from."""

    pruner: LinearPruner
    seen: _Seen | None
    text: str


@dataclass(frozen=True)
class _Asked:
    """What a search's answers depend on besides the plan."""

    ranked: _Ranked
    samples: int
    criterion: str
    released: bool
    levels: int
    target: float


@dataclass
class Session:
    """See the module's docstring. Statistics are kept by the driver: vectors of one number per input feature."""

    pool: Pool
    wanted: dict[str, tuple[type[Statistic], ...]] = field(default_factory=dict)
    """By digest of a calibration text, the kinds that later runs will ask for: gathered in the same dense pass."""
    journal: Path | None = None
    """Where finished candidates are kept, and found again by a later run."""
    _statistics: dict[_Seen, Gathered] = field(default_factory=dict)
    _first: dict[tuple[_Seen, int], Gathered] = field(default_factory=dict)
    """Of the first sequences alone, so many: what the search compares candidates with."""
    _ranked: _Ranked | None = None
    _asked: _Asked | None = None
    _answers: Answers = field(default_factory=Answers)
    _finished: bool = False

    def layout(self) -> Layout:
        """The layout of the model."""
        return self.pool.first(Worker.describe)

    def hold(self, composition: Composition, calibration: Tokens, progress: Progress, *, samples: int) -> None:
        """Bring the workers to what `composition` searches on: dense statistics, and one ranking per worker.

        A search on the first `samples` sequences will follow.
        """
        kind, pruner, text = composition.dense_statistic, composition.pruner, digest_of(calibration)
        seen = None
        if kind is not None:
            seen = _Seen(text, RunningNorm if composition.released else kind, composition.released)
            if seen not in self._statistics:
                self._gather(seen, calibration, progress, samples=samples)
        ranked = _Ranked(pruner, seen, text)
        if self._ranked == ranked:
            return
        self.pool.begin()
        self.pool.each(Worker.use, pruner)
        if seen is not None:
            self.pool.each(Worker.keep_statistics, self._statistics[seen])
        self._ranked, self._asked, self._finished = ranked, None, False
        if composition.released or pruner.solves:
            return
        with progress.stage("ranking", 1) as advance:
            if pruner.walks:
                self.pool.each(Worker.rank_on_walk, calibration)
            else:
                self.pool.each(Worker.rank)
            advance("")

    def search(
        self, composition: Composition, calibration: Tokens, progress: Progress, *, samples: int, mode: str
    ) -> Search:
        """The way to ask for candidates on the first `samples` calibration sequences; `hold` comes first."""
        assert self._ranked is not None, "hold comes first"
        asked = _Asked(
            self._ranked,
            samples,
            composition.criterion,
            composition.released,
            composition.levels,
            composition.target if composition.levels else 0.0,
        )
        if self._asked != asked:
            self._asked, self._answers = asked, self._known(asked, mode)
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
            answers=self._answers,
            reference=None if self._ranked.seen is None else self._first.get((self._ranked.seen, samples)),
        )

    def _known(self, asked: _Asked, mode: str) -> Answers:
        """What an earlier run of the same question on the same devices was answered."""
        if self.journal is None:
            return Answers()
        pruner = asked.ranked.pruner
        question = score_versions(pruner.method, pruner.refinement or "") | {
            "search": f"{asked} {mode}",
            "device": self.pool.first(Worker.device_name),
            "model": self.pool.first(Worker.fingerprint),
        }
        journal = Journal(self.journal, question)
        answers = Answers.kept(journal)
        if len(answers):
            logger.warning("%d finished candidates are taken from %s", len(answers), self.journal)
        elif others := journal.differences():
            logger.warning("no finished candidate is taken from %s: another %s", self.journal, ", ".join(others))
        return answers

    def settle(self, composition: Composition, plan: Plan, calibration: Tokens, progress: Progress) -> None:
        """Bring the workers to the final masks, or weights, under `plan`: cuts of the one ranking need no work."""
        pruner = composition.pruner
        walk = Walk(pruned=composition.pruned_stream, released=composition.released)
        if not walk.pruned and not pruner.walks and pruner.refinement is None:
            if self._finished:
                self.pool.each(Worker.unfinish)
                self._finished = False
            return
        stage = "pruned stream" if walk.pruned else "final pass" if pruner.walks else "refinement"
        with progress.stage(stage, 1) as advance:
            self.pool.each(Worker.finish, plan, calibration, walk)
            advance("")
        self._finished = True

    def _gather(self, seen: _Seen, calibration: Tokens, progress: Progress, *, samples: int) -> None:
        """The dense pass over a calibration text, for all kinds of statistics that are wanted of it."""
        kinds = [seen.kind]
        if not seen.released:
            kinds += [kind for kind in self.wanted.get(seen.text, ()) if kind is not seen.kind]
        chunk = 1  # the released code's running mean wants single ones
        if not seen.released:
            chunk = self.pool.first(Worker.chunk_sequences, calibration.shape[1])
        parts = calibration.split(chunk)
        gathered = self._merged(parts, kinds, progress, first=samples)
        for kind, (first, statistics) in zip(kinds, gathered, strict=True):
            one = _Seen(seen.text, kind, seen.released)
            self._statistics[one] = statistics
            if first is not None and not seen.released:
                self._first[one, samples] = first

    def _merged(
        self, parts: Sequence[Tokens], kinds: Sequence[type[Statistic]], progress: Progress, *, first: int
    ) -> list[tuple[Gathered | None, Gathered]]:
        """Statistics of the dense model over all parts of a text, merged in their order; and, where parts end there,
        over the `first` sequences, which are merged first.
        """
        found: list[Gathered] = [{} for _ in kinds]
        firsts: list[Gathered | None] = [None for _ in kinds]
        passed = 0
        with progress.stage("statistics", len(parts)) as advance:
            spread = self.pool.map if len(parts) == 1 else partial(map_side_by_side, self.pool)  # one has all threads
            answers = spread(Worker.observe_all, parts, tuple(kinds))
            for part, observed in zip(parts, answers, strict=True):
                for known, seen in zip(found, observed, strict=True):
                    for group, statistic in seen.items():
                        known[group] = known[group].merge(statistic) if group in known else statistic
                passed += len(part)
                if passed == first:
                    firsts = [self._over(known, passed) for known in found]
                advance("")
        return [(head, self._over(known, passed)) for head, known in zip(firsts, found, strict=True)]

    def _over(self, statistics: Gathered, sequences: int) -> Gathered:
        """A copy; what not every sequence reaches is said to be of so many."""
        routed = set(self.layout().routed)
        return statistics | {group: statistics[group].over(sequences) for group in routed & set(statistics)}
