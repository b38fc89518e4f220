"""Which methods, allocations, row steps, refinements and patterns go together, and what absent options become.

The table in docs/composition.md is this file in words.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from neuronal_ray.algorithms import registry
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.alignment import Trial
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec, Weighed
from neuronal_ray.core.pattern import Pattern, parse_pattern, pattern_target
from neuronal_ray.core.plan import Counts, Plan, exact_plan, uniform_rates
from neuronal_ray.core.problem import BlockTask, Problem, RankedLinear
from neuronal_ray.core.stats import Moments, SquareSum, Statistic
from neuronal_ray.prune.config import PruneConfig

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_DEFAULT_TARGET = 0.7
_RELEASED_METHODS = ("magnitude", "wanda", "multiflow", "sparsegpt")
_RELEASED_ALLOCATIONS = ("uniform", "owl", "neuronal")
_USE_PAPER = "is not in the released code; use --mode paper"


@dataclass(frozen=True, kw_only=True)
class Composition:
    """A run with every choice made. `row_step` is None where the allocation's own rates are final."""

    target: float
    pruner: LinearPruner
    allocation: str
    settings: dict[str, object]
    row_step: str | None
    pruned_stream: bool
    released: bool
    criterion: str
    levels: int

    @property
    def dense_statistic(self) -> type[Statistic] | None:
        """What the dense pass over the calibration text gathers, to be kept for the whole model; None for no pass."""
        own = self.pruner.statistic is SquareSum and not self.released
        late = self.pruner.refinement is not None and not self.pruned_stream and not self.pruner.walks
        if late:
            return Moments
        return SquareSum if own or registry.load("allocations", self.allocation).STATISTIC is not None else None


def compose(config: PruneConfig) -> Composition:
    """Make every choice, check every setting. Raises BadInput in one line for what does not go together."""
    pattern = parse_pattern(config.pattern)
    fixed = pattern is not None and pattern.kept is not None
    searched = "adaptive" if config.mode == "best" else "neuronal"
    allocation = config.allocation or ("uniform" if fixed else searched)
    criterion = config.criterion or ("kl" if config.mode == "best" or allocation == "adaptive" else "alignment")
    _check_settings(config, allocation)
    pruner = LinearPruner(
        method=config.method,
        method_settings=config.settings_of("method"),
        refinement=None if config.refinement == "none" else config.refinement,
        refinement_settings=config.settings_of("refinement"),
        parts=("attention", "mlp") if config.refined_parts == "all" else (config.refined_parts,),
        pattern=pattern,
    )
    if config.mode == "authors":
        _check_released(config, allocation, pattern)
    if fixed and allocation != "uniform":
        raise BadInput(
            f"--allocation: {allocation} has nothing to spread under --pattern {config.pattern}, which fixes the "
            f"sparsity of every row; use --pattern n:{pattern.group if pattern else 8}, or --allocation uniform"
        )
    if config.method == "alps" and pruner.refinement is not None:
        raise BadInput(
            f"--refinement: {config.refinement} moves a mask, alps solves for mask and weights at once; use --method "
            "wanda, whose mask alps starts from"
        )
    if pruner.refinement is not None and registry.load("methods", config.method).SOLVES:
        logger.info("--method %s: its scores are used, its weight update is not: a refinement follows", config.method)
    barrier = _barrier_between_rows(config, pruner)
    row_step, steps = _rows(config, allocation, barrier)
    default = "pruned" if pruner.solves else "dense"  # a solver makes up for what its predecessors lost
    allocate = registry.load("allocations", allocation).allocate
    settings = registry.settings_for(allocate, config.settings_of("allocation"))
    if allocation == "besa" and barrier:
        settings |= {"per": "linear"}
    if allocation == "neuronal":
        settings |= {
            "steps": steps,
            "block_lambdas": config.block_lambdas,
            "row_lambdas": config.row_lambdas,
            "schedule": config.schedule,
            "lambda_search": config.lambda_search,
        }
    if allocation == "adaptive":
        settings |= {
            "budget": config.search_budget,
            "block_lambdas": config.block_lambdas,
            "row_lambdas": config.row_lambdas,
            "rows": row_step is None and not barrier and settings.get("rows", True),
        }
    levels = pruner.levels if allocation == "adaptive" and pruner.solves else 0
    target = _target(config, pattern)
    _rehearse(pruner, allocation, settings, mode=config.mode, target=target, criterion=criterion)
    return Composition(
        target=target,
        pruner=pruner,
        allocation=allocation,
        settings=settings,
        row_step=row_step,
        pruned_stream=config.mode == "authors" or (config.score_stream or default) == "pruned",
        released=config.mode == "authors",
        criterion=criterion,
        levels=levels,
    )


class _Asked(Exception):
    """The allocation has checked its settings and asks the model."""


class _Unasked:
    """A probe (allocations.Probe) that answers nothing."""

    def tries(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[Trial]:
        raise _Asked

    def losses(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[float]:
        raise _Asked

    def divergences(self, step: str, lambdas: Sequence[float], plans: Sequence[Plan]) -> list[tuple[float, ...]]:
        raise _Asked

    def changed(self, plan: Plan, changes: Sequence[Counts], part: range) -> list[float]:
        raise _Asked

    def differences(self, plan: Plan) -> dict[Linear, Tensor]:
        raise _Asked

    def measure(self, function: Callable[[Sequence[Weighed]], Result]) -> list[Result]:
        raise _Asked

    def map_linears(self, function: Callable[[RankedLinear], Result], plan: Plan) -> dict[Linear, Result]:
        raise _Asked

    def learn(self, function: Callable[[BlockTask], Result]) -> list[Result]:
        raise _Asked


def _rehearse(
    pruner: LinearPruner, allocation: str, settings: dict[str, object], *, mode: str, target: float, criterion: str
) -> None:
    """Run the plug-ins on one tiny linear: they check the ranges of their settings before they do anything."""
    size = 2 * pruner.group or 4
    weight = torch.eye(size) + torch.arange(float(size))
    inputs = torch.eye(size)[None] + 1  # [sequences, tokens, columns]
    specs = tuple(
        LinearSpec(
            linear=Linear(block, ""), rows=size, columns=size, reads=Group(block, 0), consumer=None, sources=None
        )
        for block in range(2)
    )
    problem = Problem(
        layout=Layout(specs),
        target=target,
        mode=mode,
        probe=_Unasked(),
        pattern=pruner.pattern,
        criterion=criterion,
    )
    with suppress(_Asked):
        registry.load("allocations", allocation).allocate(problem, **settings)
    plan = exact_plan(Layout(specs), uniform_rates(Layout(specs), lambda _: 0.5), target=0.5)
    statistic = None if pruner.statistic is None else pruner.statistic.of(inputs)
    ranks = pruner.ranked(weight, statistic, lower_ties_first=True)
    if pruner.solves:
        assert statistic is not None
        pruner.solved(specs[0], weight, pruner.factorized(statistic), plan)
    if pruner.refinement is not None:
        removed = plan.removed[specs[0].linear]
        moments = pruner.final_statistics[-1].of(inputs)
        pruner.refined(replace(specs[0], part=pruner.parts[0]), weight, ranks, removed, statistic, moments)


def _target(config: PruneConfig, pattern: Pattern | None) -> float:
    if pattern is None or pattern.kept is None:
        return _DEFAULT_TARGET if config.sparsity is None else config.sparsity
    target = pattern_target(pattern)
    if config.sparsity is not None and config.sparsity != target:
        raise BadInput(f"--sparsity: {config.sparsity} is not what --pattern {config.pattern} gives; leave it out")
    return target


def _barrier_between_rows(config: PruneConfig, pruner: LinearPruner) -> str:
    """Why the rows of a linear cannot differ; empty if they can."""
    if pruner.solves:
        return f"--method {config.method} shares a linear's budget among its rows itself"
    if pruner.pattern is not None:
        return f"--pattern {config.pattern} gives every row of a linear the same number of weights"
    return ""


def _rows(config: PruneConfig, allocation: str, barrier: str) -> tuple[str | None, str]:
    """The row step that follows the allocation, and the steps that NeuronAL itself is asked for."""
    asked = config.row_step is not None or (allocation == "neuronal" and config.neuronal_steps == "row")
    if barrier and asked:
        flag = "--row-step" if config.row_step is not None else "--neuronal-steps row"
        raise BadInput(f"{flag}: {barrier}; leave rows alone (NeuronAL: --neuronal-steps block)")
    if barrier and allocation == "besa" and config.settings.get("allocation.per") == "row":
        raise BadInput(f"--set allocation.per: {barrier}; use allocation.per=linear")
    if barrier:
        if allocation == "neuronal" and config.neuronal_steps == "both":
            logger.info("NeuronAL's block step only: %s", barrier)
        return None, "block"
    if allocation != "neuronal":
        return config.row_step, "block"
    if config.neuronal_steps == "block" and config.row_step is not None:
        raise BadInput("--row-step: there is no row step with --neuronal-steps block; use both")
    if config.row_step == "trim" and config.neuronal_steps == "row":
        raise BadInput("--neuronal-steps: row asks for NeuronAL's own; use --allocation uniform --row-step trim")
    if config.row_step == "trim":
        return "trim", "block"
    return None, config.neuronal_steps


def _check_released(config: PruneConfig, allocation: str, pattern: Pattern | None) -> None:
    """Refuse what the released code does not have."""
    if config.method not in _RELEASED_METHODS:
        raise BadInput(f"--method: {config.method} {_USE_PAPER}")
    if allocation not in _RELEASED_ALLOCATIONS:
        raise BadInput(f"--allocation: {allocation} {_USE_PAPER}")
    if pattern is not None:
        raise BadInput(f"--pattern: {config.pattern} {_USE_PAPER}")
    if config.row_step == "trim" or (config.row_step is not None and allocation != "neuronal"):
        raise BadInput(f"--row-step: {config.row_step} with --allocation {allocation} {_USE_PAPER}")
    if config.refinement != "none" and allocation != "uniform":
        raise BadInput(f"--refinement: {config.refinement} with --allocation {allocation} {_USE_PAPER}")
    if config.score_stream == "dense":
        raise BadInput("--score-stream: dense is not what the released code does; use --mode paper")
    for flag, value, only in (
        ("criterion", config.criterion or "alignment", "alignment"),
        ("schedule", config.schedule, "linear"),
        ("lambda-search", config.lambda_search, "set"),
    ):
        if value != only:
            raise BadInput(f"--{flag}: {value} {_USE_PAPER}")


def _check_settings(config: PruneConfig, allocation: str) -> None:
    """Refuse unknown names and settings, and settings that have flags of their own."""
    method = registry.load("methods", config.method)
    _checked("method", [method.score, method.factorize, method.solve] if method.SOLVES else [method.score], config)
    spread = registry.load("allocations", allocation)
    _checked("allocation", [spread.allocate], config)
    with_flags = {"adaptive": ("budget", "block_lambdas", "row_lambdas")}.get(allocation, ())
    for name in config.settings_of("allocation"):
        if allocation == "neuronal" or name in with_flags:
            raise BadInput(f"--set allocation.{name}: has a flag of its own (see --help)")
    if config.refinement != "none":
        _checked("refinement", [registry.load("refinements", config.refinement).refine], config)
    elif config.settings_of("refinement"):
        raise BadInput("--set refinement: there is no refinement to set; add --refinement")


def _checked(owner: str, functions: Sequence[Callable[..., object]], config: PruneConfig) -> None:
    registry.check_settings(functions, config.settings_of(owner), owner=owner)
