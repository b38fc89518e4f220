"""ALPS: an operator splitting selects the weights that stay, conjugate gradients give them their values.

Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models, NeurIPS 2024.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from neuronal_ray.algorithms.declarations import Method
from neuronal_ray.algorithms.methods import Quota
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.masks import zeros_of
from neuronal_ray.core.stats import Gram, Statistic

_CHECK_EVERY, _STOP_AFTER = 3, 30  # iterations
_LARGE_CHANGE, _SMALL_CHANGE, _NO_CHANGE = 0.1, 0.005, 0.0003  # of the support, as fractions of the weights kept
_LARGE_GROWTH, _MEDIUM_GROWTH, _SMALL_GROWTH, _SHRINKAGE, _MOST_RHO = 1.3, 1.2, 1.1, 0.2, 1e6
_CONJUGATE_TOLERANCE = 1e-4
_BIN_SHIFT = 18  # of a float32's bits: the exponent and five bits of the fraction stay


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """The damped Gram matrix of one input, scaled to a unit diagonal, and its spectrum; shared by the input's linears.

    `scale` multiplies a weight's columns. `dead` inputs are always zero; their rows of `eigenvectors` are zero.
    """

    gram: Float32[Tensor, "columns columns"]
    eigenvalues: Float32[Tensor, " columns"]
    eigenvectors: Float32[Tensor, "columns columns"]
    scale: Float32[Tensor, " columns"]
    dead: Bool[Tensor, " columns"]


def score(weight: Float[Tensor, "rows columns"], inputs: Statistic) -> Float32[Tensor, "rows columns"]:
    """Return |W_ij| * a_j, Wanda's score, which (without damping) ranks the weights at the solver's starting point.

    Allocations that learn rates rank by it: they need a score that depends on no other weight.
    """
    return weight.float().abs() * inputs.norm


def factorize(inputs: Statistic, *, damping: float = 0.01) -> Factor:
    """Return the Gram matrix H plus `damping` times its mean diagonal, scaled and decomposed (section 3.2).

    Raises BadInput when H can be decomposed neither in float32 nor in float64.
    """
    check(damping=damping)
    assert isinstance(inputs, Gram), type(inputs)
    diagonal = inputs.total.diagonal()
    dead = diagonal == 0
    damped = diagonal + damping * diagonal.mean()
    scale = torch.where(damped > 0, damped, 1.0).sqrt()  # without damping, dead inputs have 0
    gram = inputs.total / scale
    gram /= scale[:, None]
    gram.diagonal().copy_(damped / scale.square())
    eigenvalues, eigenvectors = _decompose(gram)
    eigenvectors[dead] = 0  # keeps the weights of dead inputs at exactly zero in every iteration
    return Factor(gram=gram, eigenvalues=eigenvalues, eigenvectors=eigenvectors, scale=scale, dead=dead)


def _decompose(
    gram: Float32[Tensor, "columns columns"],
) -> tuple[Float32[Tensor, " columns"], Float32[Tensor, "columns columns"]]:
    """Return the eigenvalues and, as columns, the eigenvectors; computed in float64 where float32 fails."""
    for dtype in (torch.float32, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(gram.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue  # with the next, more accurate type
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.float().clamp_min(0), vectors.float()
    raise BadInput(
        "--method alps: the inputs' Gram matrix has no eigendecomposition; use a larger --set method.damping, or "
        "look for NaN or infinite activations"
    )


def solve(
    weight: Float[Tensor, "rows columns"],
    factor: Factor,
    quota: Quota,
    *,
    rho: float = 0.1,
    iterations: int = 300,
    conjugate_steps: int = 10,
) -> Float32[Tensor, "rows columns"]:
    """Return the W' with `quota.removed` zeros that (nearly) minimizes ||X W - X W'||^2 (section 3.1).

    At most `iterations` of ADMM choose the weights that stay, among all of the linear (or of each group of inputs);
    at most `conjugate_steps` of conjugate gradients refine their values. All float32. Weights of dead inputs are zero
    and count as removed, and so do the zeros in `weight`, unless `quota.revive` lets them become numbers; if they are
    more than `quota.removed`, so are the zeros of the result. With nothing to remove the weight is returned unchanged.
    Differs: conjugate gradients stop row by row, by the residual on the support; the released code compares one that
    includes the weights removed, and never stops early.
    """
    if quota.rate is not None:
        raise BadInput("--method alps: not in the released code; use --mode paper")
    check(rho=rho, iterations=iterations, conjugate_steps=conjugate_steps)
    if quota.removed == 0:
        return weight.to(torch.float32, copy=True)
    if quota.removed == weight.numel():
        return torch.zeros_like(weight, dtype=torch.float32)
    alive = weight.float().masked_fill(factor.dead, 0).contiguous()
    target = alive * factor.scale
    zeros = None if quota.revive else zeros_of(weight)
    start = _support(target, quota, zeros)
    if torch.equal(target * start, target):  # only zeros go
        return alive
    found = _split(target, start, factor, quota, zeros, rho=rho, iterations=iterations)
    support = _support(found, quota, zeros)
    refined = _conjugate_gradients(found * support, target, support, factor.gram, steps=conjugate_steps)
    return (refined / factor.scale).masked_fill(~support, 0)


def check(*, damping: float = 0.01, rho: float = 0.1, iterations: int = 300, conjugate_steps: int = 10) -> None:
    """Raise BadInput for settings out of range."""
    if not (math.isfinite(damping) and damping >= 0):
        raise BadInput(f"--set method.damping: {damping}, expected a number that is not negative")
    if not (math.isfinite(rho) and rho > 0):
        raise BadInput(f"--set method.rho: {rho}, expected a number greater than 0")
    if iterations < 0:
        raise BadInput(f"--set method.iterations: {iterations}, expected 0 or more")
    if conjugate_steps < 0:
        raise BadInput(f"--set method.conjugate_steps: {conjugate_steps}, expected 0 or more")


def _split(
    target: Float32[Tensor, "rows columns"],
    start: Bool[Tensor, "rows columns"],
    factor: Factor,
    quota: Quota,
    zeros: Bool[Tensor, "rows columns"] | None,
    *,
    rho: float,
    iterations: int,
) -> Float32[Tensor, "rows columns"]:
    """Return the last dense iterate of ADMM, whose projection is the solution (section 3.2, Algorithm 1).

    The paper's W, D (here `dense`, `sparse`) and V = rho * U (`dual` is U), rearranged so that H * target is not
    needed: W = target + (D - U - target) * rho * (H + rho * I)^-1, D = projection of W + U, U = W + U - D.
    Every third iteration the change of D's support decides on rho and on the end, as in the released code: while rho
    has never grown, a small change restarts with a fifth of rho, and no change goes on with a fifth of rho.
    """
    kept = target.numel() - quota.removed
    support = start
    sparse, dual, dense = target * start, torch.zeros_like(target), target
    resolvent = _resolvent(factor, rho, rows=target.shape[0])
    grown = False
    for iteration in range(1, iterations + 1):
        dense = _times((sparse - dual).sub_(target), resolvent, plus=target)
        dual += dense
        current = _support(dual, quota, zeros)
        sparse = dual * current
        dual -= sparse
        if iteration % _CHECK_EVERY:
            continue
        change = int((current != support).count_nonzero()) / kept
        support = current
        if change == 0 and grown:
            break
        growth = _growth(change, grown=grown)
        grown = growth > 1
        if change > 0 and not grown:
            dense, sparse = target, target * start
            dual.zero_()
        if iteration > _STOP_AFTER and change < _NO_CHANGE:
            break
        updated = min(rho * growth, _MOST_RHO)
        dual *= rho / updated
        rho = updated
        resolvent = _resolvent(factor, rho, rows=target.shape[0])
    return dense


def _growth(change: float, *, grown: bool) -> float:
    """Return the factor of rho's next value (released code; Algorithm 1 without the shrinkage)."""
    if change > _LARGE_CHANGE:
        return _LARGE_GROWTH
    if change > _SMALL_CHANGE:
        return _MEDIUM_GROWTH
    return _SMALL_GROWTH if grown else _SHRINKAGE


def _resolvent(factor: Factor, rho: float, *, rows: int) -> list[Float32[Tensor, "columns columns"]]:
    """Return rho * (H + rho * I)^-1 as one factor or two, whichever is cheaper until rho changes.

    A second factor costs a product with `rows` rows in each iteration and saves one with `columns` rows per check.
    """
    scaled = factor.eigenvectors * (rho / (factor.eigenvalues + rho))
    transposed = factor.eigenvectors.t()
    return [scaled @ transposed] if len(scaled) < _CHECK_EVERY * rows else [scaled, transposed]


def _times(
    left: Float32[Tensor, "rows columns"],
    factors: list[Float32[Tensor, "columns columns"]],
    *,
    plus: Float32[Tensor, "rows columns"],
) -> Float32[Tensor, "rows columns"]:
    """Return `plus` + `left` @ all factors."""
    for factor in factors[:-1]:
        left = left @ factor
    return torch.addmm(plus, left, factors[-1])


def _conjugate_gradients(
    start: Float32[Tensor, "rows columns"],
    target: Float32[Tensor, "rows columns"],
    support: Bool[Tensor, "rows columns"],
    gram: Float32[Tensor, "columns columns"],
    *,
    steps: int,
) -> Float32[Tensor, "rows columns"]:
    """Return the least squares solution on a fixed support, all rows at once (section 3.3, Algorithm 2).

    The paper's Jacobi preconditioner is the identity here: the scaled Gram matrix has a unit diagonal. A row whose
    residual has fallen to 1e-4 of its right-hand side is left as it is.
    """
    limits = ((target @ gram) * support).square().sum(dim=1) * _CONJUGATE_TOLERANCE**2  # [rows]
    residual = ((target - start) @ gram).mul_(support)
    direction = residual.clone()
    squares = residual.square().sum(dim=1)  # [rows]
    found = start.clone()
    for _ in range(steps):
        active = squares > limits
        if not bool(active.any()):
            break
        image = direction @ gram
        curvature = (direction * image).sum(dim=1)
        step = torch.where(active, squares / curvature, 0.0)[:, None]  # a row at rest divides by zero
        found.addcmul_(step, direction)
        residual.addcmul_(step, image, value=-1).mul_(support)
        updated = residual.square().sum(dim=1)
        direction.mul_(torch.where(active, updated / squares, 0.0)[:, None]).add_(residual)
        squares = updated
    return found


def _support(
    values: Float32[Tensor, "rows columns"], quota: Quota, zeros: Bool[Tensor, "rows columns"] | None = None
) -> Bool[Tensor, "rows columns"]:
    """Return False for the `quota.removed` of least magnitude, of all or of each group of inputs; True for the others.

    `zeros` count as magnitude 0, and none of them is True. Tie rule: of equal magnitudes, the lower flat index goes
    first.
    """
    if zeros is not None:
        return _support(values.masked_fill(zeros, 0), quota) & ~zeros
    per_set = quota.group or values.numel()
    removed, rest = divmod(quota.removed * per_set, values.numel())
    assert rest == 0, quota
    assert values.shape[1] % (quota.group or 1) == 0, (values.shape, quota)
    magnitude = values.abs().view(-1, per_set)  # [rows, columns] -> [sets, weights of a set]
    if quota.group:
        limit = magnitude.kthvalue(removed, dim=1, keepdim=True).values  # [sets, 1]
    else:
        limit = _kth_value(magnitude.view(-1), removed)
    support = magnitude > limit
    if int(support.count_nonzero()) < values.numel() - quota.removed:
        tied = magnitude == limit
        places = per_set - removed - support.sum(dim=1, keepdim=True)  # [sets, 1]
        support |= tied & (tied.flip(1).cumsum(dim=1).flip(1) <= places)
    return support.view_as(values)


def _kth_value(magnitude: Float32[Tensor, " items"], position: int) -> Float32[Tensor, ""]:
    """Return the value at `position`, counted from 1, in ascending order; no value may be negative.

    The bits of floats that are not negative are ordered as integers are: a histogram of the leading bits selects the
    few items that have to be sorted, which is four times as fast as `kthvalue` of all.
    """
    bins = magnitude.view(torch.int32) >> _BIN_SHIFT
    counts = bins.bincount().cumsum(dim=0)
    found = int(torch.searchsorted(counts, position))
    below = int(counts[found - 1]) if found else 0
    return magnitude[bins == found].kthvalue(position - below).values


METHOD = Method(
    score=score,
    statistic=Gram,
    factorize=factorize,
    solve=solve,
    check=check,
    unrefinable=(
        "moves a mask, alps solves for mask and weights at once; use --method wanda, whose mask alps starts from"
    ),
)
