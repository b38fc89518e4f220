"""What a plug-in of each kind declares: its functions, what it needs, and what it refuses (docs/plugins.md)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from neuronal_ray.core.problem import Allocation
from neuronal_ray.core.stats import Moments, SquareSum, Statistic


@dataclass(frozen=True, kw_only=True)
class Method:
    """Declaration of a method.

    `score(weight, inputs) -> score`: weight [rows, columns] in any float dtype, `inputs` the statistic of the linear's
    calibration inputs, result float32 [rows, columns], larger where weights stay.

    `statistic` is the kind of statistic that the score reads; None for a score that needs no calibration text.

    A method that updates the weights that stay is a solver and has two more functions. `factorize(inputs) -> factor`
    is the work that all linears with one input and all candidates share. `solve(weight, factor, quota) -> weight`
    returns float32 [rows, columns] with at least `quota.removed` zeros.

    `check(*, settings...)` raises BadInput for settings out of range, before the model is read. `released` says
    whether NeuronAL's released code has the method (`--mode authors`). `unrefinable` ends the sentence "--refinement:
    NAME ..." that refuses a refinement of the method's mask; empty where refinements are possible.
    """

    score: Callable[..., Tensor]
    statistic: type[Statistic] | None
    factorize: Callable[..., object] | None = None
    solve: Callable[..., Tensor] | None = None
    check: Callable[..., None] | None = None
    released: bool = False
    unrefinable: str = ""

    def __post_init__(self) -> None:
        if (self.factorize is None) is not (self.solve is None):
            raise TypeError("Method: a solver has both factorize and solve, other methods have neither")

    @property
    def solves(self) -> bool:
        """Whether the method updates the weights that stay."""
        return self.solve is not None

    @property
    def functions(self) -> list[Callable[..., object]]:
        """All functions whose keyword-only arguments are settings."""
        return [function for function in (self.score, self.factorize, self.solve) if function is not None]


@dataclass(frozen=True, kw_only=True)
class Allocator:
    """Declaration of an allocation.

    `allocate(problem, *, settings...) -> Allocation`.

    `statistic` is the kind of input statistic that `problem.probe.measure` hands out; None for an allocation that
    reads no activations through it.

    `check(terms, *, settings...)` raises BadInput for settings out of range and for terms (`core.problem.Terms`) that
    the allocation cannot serve, before the model is read. `candidates(terms, *, settings...)` returns how many
    candidates each step of its search will try, for the estimate of `--dry-run`.

    `options` maps arguments to the option that sets them where the names differ. `released` says whether NeuronAL's
    released code has the allocation (`--mode authors`). `criterion` is the default of `--criterion` where the
    allocation has one of its own. `row_step` names the row step that the allocation runs itself.
    `spreads` is False where every row gets the same rate. `combines_levels`: candidates of a solver are put together
    from linears that were solved at a few levels before the search.
    """

    allocate: Callable[..., Allocation]
    statistic: type[SquareSum] | type[Moments] | None = None
    check: Callable[..., None] | None = None
    candidates: Callable[..., dict[str, int]] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    released: bool = False
    criterion: str | None = None
    row_step: str | None = None
    spreads: bool = True
    combines_levels: bool = False


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """Declaration of a row step.

    `spread_rows(problem, allocation, *, settings...) -> Allocation` returns the allocation with other rates of rows
    (see `Allocation.with_rows`).

    `check(terms, *, settings...)` raises BadInput for settings out of range, before the model is read.
    `candidates(terms, *, settings...)` returns how many candidates the step will try, for the estimate of `--dry-run`.
    `options` maps arguments to the option that sets them where the names differ. `reads_calibration`: the step uses
    `problem.probe.map_linears`, which passes the whole calibration text through the dense model.
    """

    spread_rows: Callable[..., Allocation]
    check: Callable[..., None] | None = None
    candidates: Callable[..., dict[str, int]] | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    reads_calibration: bool = False


@dataclass(frozen=True, kw_only=True)
class Refinement:
    """Declaration of a refinement.

    `refine(weight, score, mask, inputs, group) -> mask`: weight [rows, columns], the method's score float32
    [rows, columns], mask bool [rows, columns], True where weights go, `inputs` a statistic of kind `statistic`, `group`
    the length of a pattern's groups of inputs (0 without a pattern; with one, the count of each group stays too).

    `check(*, settings...)` raises BadInput for settings out of range, before the model is read. `released` says
    whether NeuronAL's released code has the refinement (`--mode authors`).
    """

    refine: Callable[..., Tensor]
    statistic: type[Statistic]
    check: Callable[..., None] | None = None
    released: bool = False
