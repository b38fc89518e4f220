"""Pruning one linear: method, refinement and pattern put together."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.declarations import Method, Refinement
from neuronal_ray.algorithms.methods import Quota
from neuronal_ray.core.layout import LinearSpec
from neuronal_ray.core.level_plan import LEVELS
from neuronal_ray.core.masks import lowest_mask, rank_mask, rank_rows, zeros_of
from neuronal_ray.core.pattern import Pattern, rank_in_groups
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import Gram, Statistic

Ranks = Int[Tensor, "rows columns"]
Result = TypeVar("Result")
Weight = Float[Tensor, "rows columns"]


@dataclass(frozen=True, kw_only=True)
class LinearPruner:
    """The names of plug-ins and their settings, as sent to workers; `parts` are the sub-blocks that are refined.

    Weights that are zero already are the first to go and stay zero, unless a solver may `revive` them.
    """

    method: str = "magnitude"
    method_settings: Mapping[str, object] = field(default_factory=dict)
    refinement: str | None = None
    refinement_settings: Mapping[str, object] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    pattern: Pattern | None = None
    revive: bool = False

    @property
    def _method(self) -> Method:
        return registry.load("methods", self.method)

    @property
    def _refinement(self) -> Refinement:
        assert self.refinement is not None
        return registry.load("refinements", self.refinement)

    @property
    def solves(self) -> bool:
        """Whether the weights that stay are updated; a refinement changes the mask alone."""
        return self._method.solves and self.refinement is None

    @property
    def statistic(self) -> type[Statistic] | None:
        """The kind of statistic of a linear's inputs that the method reads."""
        return self._method.statistic

    @property
    def final_statistics(self) -> tuple[type[Statistic], ...]:
        """The kinds that the final masks need: the method's first, the refinement's last; one that serves both once."""
        own = () if self.statistic is None else (self.statistic,)
        if self.refinement is None:
            return own
        refined = self._refinement.statistic
        return (*own, refined) if self.walks else (refined,)  # it has the norms that other methods read

    @property
    def walks(self) -> bool:
        """Whether the method's statistics are too large to keep for a whole model: they are kept for one block."""
        return self.statistic is Gram

    @property
    def group(self) -> int:
        """Length of the pattern's groups of inputs, 0 without a pattern."""
        return 0 if self.pattern is None else self.pattern.group

    def _call(self, function: Callable[..., Result], *args: object) -> Result:
        return function(*args, **registry.settings_for(function, self.method_settings))

    def ranked(self, weight: Weight, inputs: Statistic | None, *, lower_ties_first: bool) -> Ranks:
        """Return the ranking whose first entries of each row are every mask of the linear."""
        score = self._score(weight, inputs)
        if self.pattern is not None:
            return rank_in_groups(score, self.pattern.group, lower_ties_first=lower_ties_first)
        return rank_rows(score, lower_ties_first=lower_ties_first)

    def refined(
        self,
        spec: LinearSpec,
        weight: Weight,
        ranks: Ranks,
        removed: Int32[Tensor, " rows"],
        inputs: Statistic | None,
        moments: Statistic,
    ) -> Ranks:
        """Return a ranking whose mask at `removed` is the refined one; `ranks` itself where nothing is refined."""
        if spec.sub_block not in self.parts:
            return ranks
        score = self._score(weight, inputs)
        refine = self._refinement.refine
        settings = registry.settings_for(refine, self.refinement_settings)
        mask = refine(weight, score, lowest_mask(ranks, removed), moments, self.group, **settings)
        if mask.shape != weight.shape or not torch.equal(mask.sum(dim=1), removed.to(mask.device)):
            raise ValueError(
                f"--refinement {self.refinement}: {spec.linear}: removes other numbers of weights from rows"
            )
        return rank_mask(mask)

    def _score(self, weight: Weight, inputs: Statistic | None) -> Tensor:
        """Return the method's score, -inf for weights that are zero already.

        Raises ValueError for a wrong shape, and for a NaN from finite inputs.
        """
        score = self._call(self._method.score, weight, inputs)
        if score.shape != weight.shape:
            shapes = f"{list(score.shape)} for a weight of shape {list(weight.shape)}"
            raise ValueError(f"--method {self.method}: returned a score of shape {shapes}")
        if bool(score.isnan().any()) and weight.isfinite().all() and (inputs is None or inputs.norm.isfinite().all()):
            raise ValueError(f"--method {self.method}: returned a score that is NaN")
        zeros = None if self.revive else zeros_of(weight)
        return score if zeros is None else score.masked_fill(zeros, -math.inf)

    def factorized(self, inputs: Statistic) -> object:
        """Return the solver's work that the linears of one group and all candidates share."""
        factorize = self._method.factorize
        assert factorize is not None, self.method
        return self._call(factorize, inputs)

    @property
    def levels(self) -> int:
        """The number of levels of sparsity of a linear that is solved before a search."""
        return self.group or LEVELS

    def solved_at(self, weight: Weight, factor: object, *, removed: int, rate: float | None = None) -> Weight:
        """Return the solver's weights in the dtype of `weight`; `removed` of them, or more, are zero."""
        solve = self._method.solve
        assert solve is not None, self.method
        quota = Quota(removed=removed, group=self.group, rate=rate, revive=self.revive)
        solved = self._call(solve, weight, factor, quota).to(weight.dtype)
        zeros = None if self.revive else zeros_of(weight)
        return solved if zeros is None else solved.masked_fill(zeros, 0)  # whatever a solver from outside does

    def solved(self, spec: LinearSpec, weight: Weight, factor: object, plan: Plan) -> Weight:
        """Return the solver's weights of the linear under `plan`."""
        removed = int(plan.removed[spec.linear].sum())
        return self.solved_at(weight, factor, removed=removed, rate=plan.solver_rates.get(spec.linear))
