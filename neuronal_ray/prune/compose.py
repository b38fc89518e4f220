"""Which plug-ins and patterns go together, and the defaults of absent options.

The table in docs/composition.md is this file in words; what a plug-in itself refuses is declared in its file.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.declarations import Allocator, Method, RowStep
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.pattern import Pattern, parse_pattern, pattern_target
from neuronal_ray.core.problem import Terms
from neuronal_ray.core.stats import SquareSum, Statistic
from neuronal_ray.data.window_start import AUTO, PAPERS
from neuronal_ray.prune.config import PruneConfig

logger = logging.getLogger(__name__)

_DEFAULT_TARGET = 0.7
_UNIFORM = "uniform"
_SEARCHED = {"best": "adaptive", "paper": "neuronal", "authors": "neuronal"}
"""The default of --allocation by mode."""
_USE_PAPER = "is not in the released code; use --mode paper"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A run with every choice made.

    `row_step`, with `row_settings`, follows the allocation; None where the allocation's rates are final.
    """

    terms: Terms
    pruner: LinearPruner
    allocation: str
    settings: dict[str, object]
    row_step: str | None
    row_settings: dict[str, object]
    pruned_stream: bool
    window_start: str

    @property
    def target(self) -> float:
        """The fraction of the weights to remove."""
        return self.terms.target

    @property
    def criterion(self) -> str:
        """What candidates are compared by."""
        return self.terms.criterion

    @property
    def levels(self) -> int:
        """The number of levels that linears are solved at before the search; 0 for none."""
        return self.terms.levels

    @property
    def released(self) -> bool:
        """Whether the run does what NeuronAL's released code does."""
        return self.terms.mode == "authors"

    @property
    def allocator(self) -> Allocator:
        """The allocation's declaration."""
        return registry.load("allocations", self.allocation)

    @property
    def rows(self) -> RowStep | None:
        """The declaration of the row step that follows."""
        return None if self.row_step is None else registry.load("rows", self.row_step)

    @property
    def dense_statistic(self) -> type[Statistic] | None:
        """What the dense pass over the calibration text gathers for the whole model; None for no pass."""
        if self.pruner.refinement is not None and not self.pruned_stream and not self.pruner.walks:
            return self.pruner.final_statistics[-1]
        own = self.pruner.statistic is SquareSum and not self.released
        return SquareSum if own and self.allocator.statistic is None else self.allocator.statistic

    def candidates(self) -> dict[str, int]:
        """Return the number of candidates of each step of the search, where it is known before the run."""
        found: dict[str, int] = {}
        for step, settings in ((self.allocator, self.settings), (self.rows, self.row_settings)):
            if step is not None and step.candidates is not None:
                found |= step.candidates(self.terms, **registry.settings_for(step.candidates, settings))
        return found


def compose(config: PruneConfig) -> Composition:
    """Make every choice and check every setting. Raises BadInput in one line for what does not go together."""
    pattern = parse_pattern(config.pattern)
    fixed = pattern is not None and pattern.kept is not None
    allocation = config.allocation or (_UNIFORM if fixed else _SEARCHED[config.mode])
    method = registry.load("methods", config.method)
    allocator = registry.load("allocations", allocation)
    follows = config.row_step if config.row_step != allocator.row_step else None
    rows = None if follows is None else registry.load("rows", follows)
    pruner = LinearPruner(
        method=config.method,
        method_settings=config.settings_of("method"),
        refinement=None if config.refinement == "none" else config.refinement,
        refinement_settings=config.settings_of("refinement"),
        parts=("attention", "mlp") if config.refined_parts == "all" else (config.refined_parts,),
        pattern=pattern,
        revive=config.revive,
    )
    _check_known_settings(config, method, allocator, rows)
    if config.mode == "authors":
        _check_released(config, method, allocation, allocator, follows=follows)
    if fixed and allocator.spreads:
        raise BadInput(
            f"--allocation: {allocation} has nothing to spread under --pattern {config.pattern}, which fixes the "
            f"sparsity of every row; use --pattern n:{pattern.group if pattern else 8}, or --allocation {_UNIFORM}"
        )
    if pruner.refinement is not None and method.unrefinable:
        raise BadInput(f"--refinement: {config.refinement} {method.unrefinable}")
    if pruner.refinement is not None and method.solves:
        logger.info("--method %s: its scores are used, its weight update is not: a refinement follows", config.method)
    if pruner.revive and not pruner.solves:
        logger.warning(
            "--revive: ignored, as %s gives no weight a new value",
            config.method if pruner.refinement is None else config.refinement,
        )
    terms = Terms(
        target=_target(config, pattern),
        mode=config.mode,
        pattern=pattern,
        criterion=config.criterion or allocator.criterion or ("kl" if config.mode == "best" else "alignment"),
        levels=pruner.levels if allocator.combines_levels and pruner.solves else 0,
        rows_fixed_by=_rows_fixed_by(config, pruner),
        row_step=config.row_step,
    )
    if terms.rows_fixed_by and config.row_step is not None:
        raise BadInput(f"--row-step: {terms.rows_fixed_by}; leave --row-step out")
    settings = _settings(config, "allocation", allocator.allocate, allocator.options)
    row_settings = {} if rows is None else _settings(config, "row-step", rows.spread_rows, rows.options)
    _check_values(method.check, config.settings_of("method"))
    _check_values(allocator.check, settings, terms)
    if rows is not None:
        _check_values(rows.check, row_settings, terms)
    if pruner.refinement is not None:
        _check_values(registry.load("refinements", pruner.refinement).check, config.settings_of("refinement"))
    default = "pruned" if pruner.solves else "dense"  # a solver makes up for what its predecessors lost
    return Composition(
        terms=terms,
        pruner=pruner,
        allocation=allocation,
        settings=settings,
        row_step=follows,
        row_settings=row_settings,
        pruned_stream=config.mode == "authors" or (config.score_stream or default) == "pruned",
        window_start=config.window_start or (AUTO if config.mode == "best" else PAPERS),
    )


def _target(config: PruneConfig, pattern: Pattern | None) -> float:
    if pattern is None or pattern.kept is None:
        return _DEFAULT_TARGET if config.sparsity is None else config.sparsity
    target = pattern_target(pattern)
    if config.sparsity is not None and config.sparsity != target:
        raise BadInput(f"--sparsity: {config.sparsity} is not what --pattern {config.pattern} gives; leave it out")
    return target


def _rows_fixed_by(config: PruneConfig, pruner: LinearPruner) -> str:
    """Return why the rows of a linear cannot differ; empty if they can."""
    if pruner.solves:
        return f"--method {config.method} shares a linear's budget among its rows itself"
    if pruner.pattern is not None:
        return f"--pattern {config.pattern} gives every row of a linear the same number of weights"
    return ""


def _check_released(
    config: PruneConfig, method: Method, allocation: str, allocator: Allocator, *, follows: str | None
) -> None:
    """Raise BadInput for what the released code does not have."""
    if not method.released:
        raise BadInput(f"--method: {config.method} {_USE_PAPER}")
    if not allocator.released:
        raise BadInput(f"--allocation: {allocation} {_USE_PAPER}")
    if config.pattern != "unstructured":
        raise BadInput(f"--pattern: {config.pattern} {_USE_PAPER}")
    if follows is not None:
        raise BadInput(f"--row-step: {follows} with --allocation {allocation} {_USE_PAPER}")
    if config.refinement != "none" and not registry.load("refinements", config.refinement).released:
        raise BadInput(f"--refinement: {config.refinement} {_USE_PAPER}")
    if config.refinement != "none" and allocator.spreads:
        raise BadInput(f"--refinement: {config.refinement} with --allocation {allocation} {_USE_PAPER}")
    if config.window_start not in (None, PAPERS):
        raise BadInput(f"--window-start: {config.window_start} {_USE_PAPER}")
    if config.score_stream == "dense":
        raise BadInput("--score-stream: dense is not what the released code does; use --mode paper")
    if config.calibration_packing == "on":
        raise BadInput(f"--calibration-packing: on {_USE_PAPER}")
    if config.criterion not in (None, "alignment"):
        raise BadInput(f"--criterion: {config.criterion} {_USE_PAPER}")


def _check_known_settings(config: PruneConfig, method: Method, allocator: Allocator, rows: RowStep | None) -> None:
    """Raise BadInput for unknown settings, and for settings that have flags of their own."""
    _check_names(config, "method", method.functions)
    _check_names(config, "allocation", [allocator.allocate], allocator.options)
    if config.refinement != "none":
        _check_names(config, "refinement", [registry.load("refinements", config.refinement).refine])
    elif config.settings_of("refinement"):
        raise BadInput("--set refinement: there is no refinement to set; add --refinement")
    if rows is not None:
        _check_names(config, "row-step", [rows.spread_rows], rows.options)
    elif config.settings_of("row-step"):
        raise BadInput("--set row-step: no row step follows the allocation; add --row-step")


def _check_names(
    config: PruneConfig,
    owner: str,
    functions: Sequence[Callable[..., object]],
    options: Mapping[str, str] | None = None,
) -> None:
    given = config.settings_of(owner)
    if options is not None:
        for name in given.keys() & config.passed_to(functions[0], options).keys():
            raise BadInput(f"--set {owner}.{name}: has a flag of its own (see --help)")
    registry.check_settings(functions, given, owner=owner)


def _settings(
    config: PruneConfig, owner: str, function: Callable[..., object], options: Mapping[str, str]
) -> dict[str, object]:
    """Return the settings of a plug-in's function: `--set` and the options that the function reads."""
    return registry.settings_for(function, config.settings_of(owner)) | config.passed_to(function, options)


def _check_values(check: Callable[..., None] | None, settings: Mapping[str, object], *terms: Terms) -> None:
    if check is not None:
        check(*terms, **registry.settings_for(check, settings))
