"""DSA: block rates by a function of the block's scores.

Li et al., Discovering Sparsity Allocation for Layer-wise Pruning of Large Language Models, NeurIPS 2024.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from neuronal_ray.algorithms.declarations import Allocator
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.layout import LinearData
from neuronal_ray.core.operators import NEEDS_EXTENT, NEEDS_TERMS, PRE_OPS, REDUCTIONS, Expression, Extent, Summary
from neuronal_ray.core.plan import Rates, uniform_rates
from neuronal_ray.core.problem import Allocation, Problem, Terms
from neuronal_ray.core.spread import spread
from neuronal_ray.core.stats import SquareSum

PUBLISHED = "ABSLOG-VAR-ATAN-ASIN"
"""The function found for LLaMA-7B: ln of the scores, their variance, then asin(atan(.))."""

Pair = tuple[str, str]

_SLAB = 2**18  # weights at a time: small enough for a processor's cache

logger = logging.getLogger(__name__)


def allocate(problem: Problem, *, lam: float = 0.08, expression: str = PUBLISHED) -> Allocation:
    """Return rates of width 2 * lam over the blocks, larger where `expression` of the block's scores |W| * a is larger.

    The released code has no upper bound: at high targets a block may lose all weights.
    Differs: the search that found the published expression is left out.
    """
    check(problem, lam=lam, expression=expression)
    given = Expression.parse(expression)
    pair = (given.pre_op, given.reduction)
    by_block = problem.probe.measure(partial(reductions, pairs=(pair,)))
    reduced = torch.tensor([block[pair] for block in by_block], dtype=torch.float64)
    rates = block_rates(problem, importance(given, reduced), lam=lam)
    uniform = problem.plan(uniform_rates(problem.layout, lambda _: problem.target), rows_adapted=False)
    return Allocation(plan=problem.plan(rates, rows_adapted=False), rates=rates, baselines={"uniform": uniform})


def check(terms: Terms, *, lam: float = 0.08, expression: str = PUBLISHED) -> None:
    """Raise BadInput for settings out of range."""
    if not 0 <= lam <= 1:
        raise BadInput(f"--set allocation.lam: {lam} is not in [0, 1]")
    try:
        Expression.parse(expression)
    except BadInput as error:
        raise BadInput(f"--set allocation.expression: {error}") from error


def reductions(linears: Sequence[LinearData], *, pairs: Sequence[Pair]) -> dict[Pair, float]:
    """Return each pre-operator and reduction of the scores of all linears of a block together, as in the released code.

    The weights are read once, and once more if one of the pre-operators needs the extent of the scores.
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


def _scores(linears: Sequence[LinearData]) -> Iterator[Float32[Tensor, "rows columns"]]:
    """Yield Wanda's scores, some rows at a time: ten times as fast on a processor as a linear at a time."""
    for linear in linears:
        assert linear.inputs is not None, linear.spec.linear
        norm = linear.inputs.norm
        for rows in linear.weight.split(max(1, _SLAB // linear.spec.columns)):
            yield rows.float().abs().mul_(norm)


def _extent(linears: Sequence[LinearData]) -> Extent:
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


def importance(expression: Expression, reduced: Float64[Tensor, " blocks"]) -> Float64[Tensor, " blocks"]:
    """Return the value of `expression` for each block; 0 where a transform has no value, as in the released code.

    `reduced` are the blocks' values of the expression's reduction. asin(atan(v)) has no value where v > tan(1) = 1.56:
    with the published function the blocks of most varied scores are the densest, while below that limit a block is the
    sparser the more its scores vary. Raises BadInput where the reduction is not finite or a transform is infinite.
    Differs: the released code replaces an infinity by -1 and goes on.
    """
    values = expression.transformed(reduced)
    broken = ~reduced.isfinite() | values.isinf()
    if bool(broken.any()):
        raise BadInput(f"--set allocation.expression: {expression} is not finite in block {int(broken.int().argmax())}")
    outside = values.isnan()
    if bool(outside.any()):
        logger.warning("%s has no value in blocks %s: counted as 0", expression, outside.nonzero().flatten().tolist())
    return values.masked_fill(outside, 0.0)


def block_rates(problem: Problem, values: Float64[Tensor, " blocks"], *, lam: float) -> Rates:
    """Return rates of width 2 * lam around the target that are larger where `values` are larger.

    The released code inverts the scaled values and spreads OWL's densities by them: two inversions cancel.
    """
    by_block = spread(values, lam=lam, mean=problem.target).tolist()
    return uniform_rates(problem.layout, lambda block: by_block[block])


ALLOCATION = Allocator(allocate=allocate, statistic=SquareSum, check=check)
