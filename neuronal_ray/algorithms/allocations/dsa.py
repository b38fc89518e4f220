"""DSA: block rates by a function of a block's scores, the published one or one evolved for the model at hand.

Li et al., Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models, NeurIPS 2024.
"""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import Weighed
from neuronal_ray.core.operators import (
    NEEDS_EXTENT,
    NEEDS_TERMS,
    PAIRS,
    PRE_OPS,
    REDUCTIONS,
    TRANSFORMS,
    Expression,
    Extent,
    Summary,
)
from neuronal_ray.core.plan import Plan, Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Step
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum, Statistic

STATISTIC: type[Statistic] | None = SquareSum

PUBLISHED = "ABSLOG-VAR-ATAN-ASIN"
"""The function found for LLaMA-7B: ln of the scores, their variance, then asin(atan(.))."""

Pair = tuple[str, str]
Levels = Mapping[Pair, Float64[Tensor, " blocks"]]

_FEWEST = 4  # uniform, the given function and one pair of parents besides
_MUTATED = 0.5  # share of the children of which one part is drawn anew
_DRAWS = 50  # per child wanted, before the generation stays smaller
_SLAB = 2**18  # weights at a time: small enough for a processor's cache
_DIFFERENCE = 1e-9  # relative: blocks that differ by less than this differ by rounding

logger = logging.getLogger(__name__)


def allocate(
    problem: Problem,
    *,
    lam: float = 0.08,
    expression: str = PUBLISHED,
    search: int = 0,
    population: int = 16,
    seed: int = 0,
) -> Allocation:
    """Rates of width 2 * lam over the blocks, larger where `expression` of the block's scores |W| * a is larger.

    With `search` > 0 the function of least loss among that many generations of `population` candidates (see
    `_evolved`); uniform rates and `expression` are in the first, so none of them has less loss than the plan returned.
    The Step names candidates by Expression.number, uniform by 0; `baselines` has the plan without the search as "dsa".
    """
    if problem.mode == "authors":
        raise BadInput("--allocation dsa: not in the released code; use --mode paper")
    for name, value, least in (("search", search, 0), ("population", population, _FEWEST), ("seed", seed, 0)):
        if value < least:
            raise BadInput(f"--set allocation.{name}: {value} is not at least {least}")
    if not 0 <= lam <= 1:
        raise BadInput(f"--set allocation.lam: {lam} is not in [0, 1]")
    try:
        given = Expression.parse(expression)
    except BadInput as error:
        raise BadInput(f"--set allocation.expression: {error}") from error
    pairs = PAIRS if search else ((given.pre_op, given.reduction),)
    by_block = problem.probe.measure(partial(reductions, pairs=pairs))
    levels = {pair: torch.tensor([block[pair] for block in by_block], dtype=torch.float64) for pair in pairs}
    uniform = _candidate(problem, None, uniform_rates(problem.layout, lambda _: problem.target))
    first = _candidate(problem, given, block_rates(problem, importance(given, levels), lam=lam))
    baselines = {"uniform": uniform.plan}
    if not search:
        return Allocation(plan=first.plan, rates=first.rates, baselines=baselines)
    candidates, losses = _evolved(
        problem, [uniform, first], levels, lam=lam, generations=search, population=population, seed=seed
    )
    best = candidates[_ranked(losses)[0]]
    logger.info("DSA: %s has the least loss of %d functions", best.expression or "uniform", len(candidates))
    found = Step(
        name="dsa",
        lambdas=tuple(candidate.number for candidate in candidates),
        scores=tuple(losses),
        selected=best.number,
    )
    return Allocation(plan=best.plan, rates=best.rates, steps=(found,), baselines=baselines | {"dsa": first.plan})


def reductions(linears: Sequence[Weighed], *, pairs: Sequence[Pair]) -> dict[Pair, float]:
    """Each pre-operator and reduction of the scores of all linears of a block taken together, as in the released code.

    The weights are read once, once more if one of the pre-operators needs the extent of the scores.
    """
    extent = _extent(linears) if any(pre_op in NEEDS_EXTENT for pre_op, _ in pairs) else None
    wanted: dict[str, list[str]] = {}
    for pre_op, reduction in pairs:
        wanted.setdefault(pre_op, []).append(reduction)
    summaries: dict[str, Summary] = {}
    for scores in _scores(linears):
        for pre_op, names in wanted.items():
            terms = {term for name in names for term in NEEDS_TERMS.get(name, ())}
            summary = Summary.of(PRE_OPS[pre_op](scores, extent), terms=terms)
            summaries[pre_op] = summaries[pre_op].merge(summary) if pre_op in summaries else summary
    return {(pre_op, name): float(REDUCTIONS[name](summaries[pre_op])) for pre_op, name in pairs}


def _scores(linears: Sequence[Weighed]) -> Iterator[Float32[Tensor, "rows columns"]]:
    """Wanda's scores, some rows at a time: ten times as fast on a processor as a linear at a time."""
    for linear in linears:
        assert linear.inputs is not None, linear.spec.linear
        norm = linear.inputs.norm
        for rows in linear.weight.split(max(1, _SLAB // linear.spec.columns)):
            yield rows.float().abs().mul_(norm)


def _extent(linears: Sequence[Weighed]) -> Extent:
    whole: Summary | None = None
    bounds: list[Tensor] = []
    for scores in _scores(linears):
        summary = Summary.of(scores)
        whole = summary if whole is None else whole.merge(summary)
        bounds += scores.aminmax()
    assert whole is not None
    reach = torch.stack(bounds)
    return Extent(
        mean=float(whole.mean),
        deviation=float(REDUCTIONS["STD"](whole)),
        lowest=float(reach.min()),
        highest=float(reach.max()),
    )


def importance(expression: Expression, levels: Levels) -> Float64[Tensor, " blocks"]:
    """The value of `expression` for each block; 0 where a transform has none, as in the released code.

    asin(atan(v)) has none where v > tan(1) = 1.56: with the published function the blocks of most varied scores are the
    densest, while below that a block is the sparser the more its scores vary. Raises BadInput where the reduction is
    not finite or a transform is infinite.
    Differs: the released code takes an infinity for -1 and goes on.
    """
    reduced = levels[expression.pre_op, expression.reduction]
    values = expression.transformed(reduced)
    broken = ~reduced.isfinite() | values.isinf()
    if bool(broken.any()):
        raise BadInput(f"--set allocation.expression: {expression} is not finite in block {int(broken.int().argmax())}")
    outside = values.isnan()
    if bool(outside.any()):
        logger.warning("%s has no value in blocks %s: counted as 0", expression, outside.nonzero().flatten().tolist())
    return values.masked_fill(outside, 0.0)


def block_rates(problem: Problem, values: Float64[Tensor, " blocks"], *, lam: float) -> Rates:
    """Min-max scaled, inverted, then OWL's densities of width 2 * lam around 1 - target.

    Inverting twice is not inverting: the rates are spread as the values are.
    """
    by_block = spread(values, lam=lam, mean=problem.target).tolist()
    return uniform_rates(problem.layout, lambda block: by_block[block])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Candidate:
    """An expression, or None for uniform rates, with what it makes of the problem."""

    expression: Expression | None
    rates: Rates
    plan: Plan

    @property
    def number(self) -> float:
        """What the record calls it."""
        return 0.0 if self.expression is None else float(self.expression.number)


def _candidate(problem: Problem, expression: Expression | None, rates: Rates) -> _Candidate:
    return _Candidate(expression=expression, rates=rates, plan=problem.plan(rates, rows_adapted=False))


def _evolved(
    problem: Problem,
    first: Sequence[_Candidate],
    levels: Levels,
    *,
    lam: float,
    generations: int,
    population: int,
    seed: int,
) -> tuple[list[_Candidate], list[float]]:
    """All candidates tried and their losses on the calibration text, in order; one call of the probe per generation.

    The first generation is `first` and random expressions. Of each later one the parents are the `population` best
    of all so far (elitist); a child has two parents, each the better of two drawn (tournament), takes each of its
    parts from either (crossover), and half of the children have one part drawn anew (mutation). No plan is tried
    twice. An expression that is not finite for some block, or equal for all, is discarded.
    Differs: the released code has no such search, and the paper's takes hours: the sizes and probabilities are ours.
    """
    chance = random.Random(seed)
    candidates: list[_Candidate] = []
    losses: list[float] = []
    plans: set[bytes] = set()
    drawn: set[Expression] = set()

    def admit(candidate: _Candidate) -> None:
        if candidate.plan.digest not in plans:
            plans.add(candidate.plan.digest)
            candidates.append(candidate)

    for candidate in first:
        admit(candidate)
    for _ in range(generations):
        ranked = [candidates[index].expression for index in _ranked(losses)]
        parents = [expression for expression in ranked if expression is not None][:population]
        for _ in range(_DRAWS * population):
            if len(candidates) == len(losses) + population:
                break
            expression = _child(parents, chance) if parents else _random(chance)
            if expression in drawn:
                continue
            drawn.add(expression)
            if _valid(expression, levels):
                values = expression.transformed(levels[expression.pre_op, expression.reduction])
                admit(_candidate(problem, expression, block_rates(problem, values, lam=lam)))
        new = candidates[len(losses) :]
        if not new:
            break
        losses += problem.probe.losses("dsa", [one.number for one in new], [one.plan for one in new])
    return candidates, losses


def _ranked(losses: Sequence[float]) -> list[int]:
    """Indices by loss, first of equals first; those that are not finite last."""
    return sorted(range(len(losses)), key=lambda index: losses[index] if math.isfinite(losses[index]) else math.inf)


def _valid(expression: Expression, levels: Levels) -> bool:
    """Whether the expression has a finite value for every block, and tells some of them apart."""
    if (expression.pre_op, expression.reduction) not in levels:
        return False
    reduced = levels[expression.pre_op, expression.reduction]
    values = expression.transformed(reduced)
    if not bool((reduced.isfinite() & values.isfinite()).all()):
        return False
    return bool(values.max() - values.min() > _DIFFERENCE * values.abs().max())


def _random(chance: random.Random) -> Expression:
    """One of PAIRS with one or two transforms."""
    pre_op, reduction = chance.choice(PAIRS)
    return Expression(pre_op=pre_op, reduction=reduction, transforms=_random_transforms(chance))


def _random_transforms(chance: random.Random) -> tuple[str, ...]:
    return tuple(chance.choices(list(TRANSFORMS), k=chance.randint(1, 2)))


def _child(parents: Sequence[Expression], chance: random.Random) -> Expression:
    """The child of two of `parents`, which are in order of rank."""
    one, other = (parents[min(chance.randrange(len(parents)) for _ in range(2))] for _ in range(2))
    pre_op = chance.choice((one, other)).pre_op
    reduction = chance.choice((one, other)).reduction
    transforms = chance.choice((one, other)).transforms
    if chance.random() < _MUTATED:
        part = chance.randrange(3)
        pre_op = chance.choice(list(PRE_OPS)) if part == 0 else pre_op
        reduction = chance.choice(list(REDUCTIONS)) if part == 1 else reduction
        transforms = _random_transforms(chance) if part == 2 else transforms
    return Expression(pre_op=pre_op, reduction=reduction, transforms=transforms)
