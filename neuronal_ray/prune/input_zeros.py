"""What the zeros of the input mean for a run: whether the target leaves room for them, and how this is said."""

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.errors import BadInput

_ACCIDENTAL = 1e-3
"""Share of zeros up to which a model counts as dense: some of its weights are zero by rounding."""


def check_target(target: float, pruner: LinearPruner, *, zeros: int, prunable: int) -> None:
    """Raise BadInput for a target below the share of weights that are zero already, unless they may be revived.

    A fixed pattern has no target: groups with more zeros than it removes keep them.
    """
    fixed = pruner.pattern is not None and pruner.pattern.kept is not None
    if pruner.revive or fixed or zeros <= max(round(target * prunable), _ACCIDENTAL * prunable):
        return
    raise BadInput(
        f"--sparsity: {target:g} is below the input's, {zeros / prunable:.4f} ({zeros:,} of {prunable:,} weights are "
        "zero already); expected a higher one, or --revive with a method that gives zeros new values"
    )


def describe_zeros(pruner: LinearPruner, *, zeros: int, prunable: int) -> str:
    """Return the input's sparsity in words, and what becomes of the zeros."""
    if not zeros:
        return f"none of {prunable:,} weights is zero"
    fate = "may get new values (--revive)" if pruner.revive and pruner.solves else "stay zero"
    return f"{zeros:,} of {prunable:,} weights are zero already ({zeros / prunable:.2%}); they {fate}"
