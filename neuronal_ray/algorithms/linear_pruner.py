"""What becomes of one linear: method, refinement and pattern put together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType

from jaxtyping import Float, Int, Int32
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.methods import Quota
from neuronal_ray.core.layout import LinearSpec
from neuronal_ray.core.levels import LEVELS
from neuronal_ray.core.masks import cut, rank_mask, rank_rows
from neuronal_ray.core.pattern import Pattern, rank_in_groups
from neuronal_ray.core.plan import Plan
from neuronal_ray.core.stats import Gram, Statistic

Ranks = Int[Tensor, "rows columns"]
Weight = Float[Tensor, "rows columns"]


@dataclass(frozen=True, kw_only=True)
class LinearPruner:
    """Names and settings, as they are sent to workers; `parts` are the parts of a block that are refined."""

    method: str = "magnitude"
    method_settings: Mapping[str, object] = field(default_factory=dict)
    refinement: str | None = None
    refinement_settings: Mapping[str, object] = field(default_factory=dict)
    parts: tuple[str, ...] = ()
    pattern: Pattern | None = None

    @property
    def _method(self) -> ModuleType:
        return registry.load("methods", self.method)

    @property
    def _refinement(self) -> ModuleType:
        assert self.refinement is not None
        return registry.load("refinements", self.refinement)

    @property
    def solves(self) -> bool:
        """Whether weights that stay change too; a refinement moves the mask alone."""
        solves: bool = self._method.SOLVES
        return solves and self.refinement is None

    @property
    def statistic(self) -> type[Statistic] | None:
        """What the method reads of a linear's inputs."""
        kind: type[Statistic] | None = self._method.STATISTIC
        return kind

    @property
    def final_statistics(self) -> tuple[type[Statistic], ...]:
        """What the final masks need: the method's statistic first, the refinement's last, one that serves both once."""
        own = () if self.statistic is None else (self.statistic,)
        if self.refinement is None:
            return own
        refined: type[Statistic] = self._refinement.STATISTIC
        return (*own, refined) if self.walks else (refined,)  # it has the norms that other methods read

    @property
    def walks(self) -> bool:
        """Whether the method's statistics are too large to keep for a whole model: a block's at a time."""
        return self.statistic is Gram

    @property
    def group(self) -> int:
        """Length of the pattern's groups of inputs, 0 without a pattern."""
        return 0 if self.pattern is None else self.pattern.group

    def _call(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        return function(*args, **registry.settings_for(function, self.method_settings))

    def ranked(self, weight: Weight, inputs: Statistic | None, *, lower_ties_first: bool) -> Ranks:
        """The ranking that every mask of the linear is a cut through."""
        score = self._call(self._method.score, weight, inputs)
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
        """A ranking whose cut at `removed` is the refined mask; the cut of `ranks` where nothing is refined."""
        if spec.part not in self.parts:
            return ranks
        score = self._call(self._method.score, weight, inputs)
        refine = self._refinement.refine
        settings = registry.settings_for(refine, self.refinement_settings)
        mask = refine(weight, score, cut(ranks, removed), moments, self.group, **settings)
        return rank_mask(mask)

    def factorized(self, inputs: Statistic) -> object:
        """The solver's work that the linears of one group and all candidates share."""
        return self._call(self._method.factorize, inputs)

    @property
    def levels(self) -> int:
        """In how many steps a linear's sparsity can be chosen where it is solved before a search."""
        return self.group or LEVELS

    def solved_at(self, weight: Weight, factor: object, *, removed: int, rate: float | None = None) -> Weight:
        """The weights after the solver's sweep, in the dtype of `weight`, `removed` of them zero."""
        quota = Quota(removed=removed, group=self.group, rate=rate)
        return self._call(self._method.solve, weight, factor, quota).to(weight.dtype)

    def solved(self, spec: LinearSpec, weight: Weight, factor: object, plan: Plan) -> Weight:
        """The linear's weights after the solver's sweep under `plan`."""
        removed = int(plan.removed[spec.linear].sum())
        return self.solved_at(weight, factor, removed=removed, rate=plan.asked.get(spec.linear))
