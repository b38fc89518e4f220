"""A search over plans by divergence that spends a budget of evaluations and keeps the best plan so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.problem import Problem, Step


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluated:
    """A plan with its divergence on each search sequence, and its number in the record, from 1."""

    plan: Plan
    divergences: tuple[float, ...]
    number: int

    @property
    def score(self) -> float:
        """The mean divergence over the sequences."""
        return _mean(self.divergences)

    def betters(self, other: "Evaluated", *, halves: bool) -> bool:
        """Return whether the mean is lower than that of `other`; with `halves`, on even and on odd sequences alone.

        What improves only one half of the sequences fits their noise.
        """
        if not halves:
            return self.score < other.score
        ours, theirs = self.divergences, other.divergences
        subsets = [slice(0, None, 2), slice(1, None, 2)] if len(ours) > 1 else [slice(None)]
        return all(_mean(ours[subset]) < _mean(theirs[subset]) for subset in subsets)


class BudgetedSearch:
    """Evaluates candidates while the budget lasts; one evaluation is one pass of the whole search text.

    `left` is what remains of the budget, `first` and `best` are the first and the best plan evaluated.
    """

    def __init__(self, problem: Problem, budget: int, *, name: str, halves: bool = True) -> None:
        self.problem, self.left, self._name, self._halves = problem, float(budget), name, halves
        self.scores: list[float] = []
        self.first: Evaluated | None = None
        self.best: Evaluated | None = None

    def compare(self, plans: Sequence[Plan], base: Evaluated | None) -> tuple[int, Evaluated] | None:
        """Evaluate as many plans as the budget allows; return the best one that betters `base`, and its index."""
        plans, numbers = self._affordable(plans)
        if not plans:
            return None
        return self._selected(plans, self.problem.probe.divergences(self._name, numbers, plans), base)

    def tries(self, plans: Sequence[Plan]) -> list[Trial]:
        """Evaluate as many plans as the budget allows; return their trials."""
        plans, numbers = self._affordable(plans)
        trials = self.problem.probe.tries(self._name, numbers, plans) if plans else []
        self._selected(plans, [trial.divergences for trial in trials], self.best)
        return trials

    def step(self) -> Step:
        """Return the record, with the candidates in the order of their evaluation."""
        assert self.best is not None
        return Step(
            name=self._name,
            lambdas=tuple(float(number) for number in range(1, 1 + len(self.scores))),
            scores=tuple(self.scores),
            selected=float(self.best.number),
        )

    def _affordable(self, plans: Sequence[Plan]) -> tuple[Sequence[Plan], list[float]]:
        """Return the first plans that the budget pays for, and their numbers in the record; the budget is reduced."""
        plans = plans[: max(0, int(self.left))]
        self.left -= len(plans)
        first = len(self.scores) + 1
        return plans, [float(first + index) for index in range(len(plans))]

    def _selected(
        self, plans: Sequence[Plan], divergences: Sequence[tuple[float, ...]], base: Evaluated | None
    ) -> tuple[int, Evaluated] | None:
        """Record the plans; return the best one that betters `base`, and its index."""
        first = len(self.scores) + 1
        evaluated = [
            Evaluated(plan=plan, divergences=values, number=first + index)
            for index, (plan, values) in enumerate(zip(plans, divergences, strict=True))
        ]
        self.scores += [candidate.score for candidate in evaluated]
        if self.first is None and evaluated:
            self.first = self.best = evaluated[0]
        ranked = sorted(evaluated, key=lambda candidate: candidate.score)
        self.best = next((candidate for candidate in ranked if self._betters(candidate, self.best)), self.best)
        selected = next((candidate for candidate in ranked if self._betters(candidate, base)), None)
        return None if selected is None else (selected.number - first, selected)

    def _betters(self, candidate: Evaluated, base: Evaluated | None) -> bool:
        return base is None or candidate.betters(base, halves=self._halves)
