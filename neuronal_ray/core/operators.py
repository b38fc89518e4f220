"""DSA's operators: elements of a block transformed, reduced to one number, and that number transformed.

Names and formulas are those of the released search space (Li et al., DSA, NeurIPS 2024, section 3).
Differs: left out are what is one with another operator on scores, which are never negative (ABS is NO_OP, LOG is ABSLOG
but for a term of 1e-6), what needs a matrix where the released code hands over a vector (GRAM, CORREF, DIAGONAL,
DETERMINANT, RANK, SLOGDET), and a second operator on the elements.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput

Elements = Float[Tensor, "rows columns"]
Scalar = Float64[Tensor, ""]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of some elements: how many, their mean, the sum of squared deviations from it, and sums of TERMS.

    All stays on the elements' device, so that nothing waits for it.
    """

    count: int
    mean: Scalar
    squares: Scalar
    terms: Mapping[str, Scalar]

    @classmethod
    def of(cls, values: Elements, *, terms: Collection[str] = ()) -> Self:
        """The summary of one tensor; two readings, so that the squares do not cancel."""
        mean = _sum(values) / values.numel()
        squares = _sum((values - mean).square_())
        return cls(
            count=values.numel(),
            mean=mean,
            squares=squares,
            terms={name: _sum(TERMS[name](values)) for name in terms},
        )

    def merge(self, other: Self) -> Self:
        """The summary of both together (Chan et al., 1983, equation 1.5)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + apart * (other.count / count),
            squares=self.squares + other.squares + apart * apart * (self.count * other.count / count),
            terms={name: total + other.terms[name] for name, total in self.terms.items()},
        )


def _sum(values: Elements) -> Scalar:
    """Rows in float32, the rows' sums in float64: nothing of the tensor's size is made."""
    return values.sum(dim=1).double().sum()


def _mass_log(values: Elements) -> Elements:
    mass = values.relu()
    return torch.xlogy(mass, mass)


TERMS: dict[str, Callable[[Elements], Elements]] = {
    "magnitude": torch.abs,
    "log": torch.log,
    "mass": torch.relu,
    "mass_log": _mass_log,
}
"""What is summed over the elements for some of the reductions; not a number where a negative element has no log."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """What the elements of a whole block are normalized by: float64, the deviation over count - 1."""

    mean: float
    deviation: float
    lowest: float
    highest: float


def _abslog(scores: Elements, _: Extent | None) -> Elements:
    """ln|x|, and 0 where x is 0."""
    return scores.abs().log_().masked_fill_(scores == 0, 0.0)


def _normalize(scores: Elements, extent: Extent | None) -> Elements:
    """(x - mean) / deviation, 0 where all elements are equal."""
    assert extent is not None
    if extent.deviation == 0:
        return torch.zeros_like(scores)
    return (scores - extent.mean).div_(extent.deviation)


def _min_max(scores: Elements, extent: Extent | None) -> Elements:
    assert extent is not None
    return (scores - extent.lowest).div_(extent.highest - extent.lowest + 1e-9)


PRE_OPS: dict[str, Callable[[Elements, Extent | None], Elements]] = {
    "NO_OP": lambda scores, _: scores,
    "ABSLOG": _abslog,
    "POW": lambda scores, _: scores.square(),
    "EXP": lambda scores, _: scores.exp(),
    "SIGMOID": lambda scores, _: scores.sigmoid(),
    "TANH": lambda scores, _: scores.tanh(),
    "NORMALIZE": _normalize,
    "MMS": _min_max,
}
"""Elements of a block and, for those in NEEDS_EXTENT, its extent -> elements, float32 [rows, columns]."""

NEEDS_EXTENT = frozenset({"NORMALIZE", "MMS"})


def _variance(elements: Summary) -> Scalar:
    """Over count - 1, as torch.var."""
    return elements.squares / (elements.count - 1)


def _geometric_mean(elements: Summary) -> Scalar:
    """exp of the mean ln: 0 with an element 0, not a number with a negative one.

    Differs: the released code takes the root of the product, which no block's product survives in float32.
    """
    return (elements.terms["log"] / elements.count).exp()


def _entropy(elements: Summary) -> Scalar:
    """Entropy in nats of the elements that are not negative, over their sum: ln S - (sum of x ln x) / S."""
    mass = elements.terms["mass"]
    return mass.log() - elements.terms["mass_log"] / mass


REDUCTIONS: dict[str, Callable[[Summary], Scalar]] = {
    "MEAN": lambda elements: elements.mean,
    "VAR": _variance,
    "STD": lambda elements: _variance(elements).sqrt(),
    "FROBENIUS_NORM": lambda elements: (elements.squares + elements.count * elements.mean.square()).sqrt(),
    "L1_NORM": lambda elements: elements.terms["magnitude"] / elements.count,
    "GEOMETRIC_MEAN": _geometric_mean,
    "ENTROPY": _entropy,
}
"""The elements of a block -> one number; not finite where it has none."""

NEEDS_TERMS: dict[str, tuple[str, ...]] = {
    "L1_NORM": ("magnitude",),
    "GEOMETRIC_MEAN": ("log",),
    "ENTROPY": ("mass", "mass_log"),
}

TRANSFORMS: dict[str, Callable[[Float64[Tensor, " blocks"]], Float64[Tensor, " blocks"]]] = {
    "SIN": torch.sin,
    "COS": torch.cos,
    "TAN": torch.tan,
    "ASIN": torch.asin,
    "ACOS": torch.acos,
    "ATAN": torch.atan,
    "EXP": torch.exp,
    "LOG": torch.log,
    "ABS": torch.abs,
    "SIGMOID": torch.sigmoid,
    "TANH": torch.tanh,
    "SOFTPLUS": torch.nn.functional.softplus,
}
"""One number per block -> one per block; not finite outside the function's domain (asin above 1, log of 0)."""

_SAME = {("NORMALIZE", name) for name in REDUCTIONS if name not in ("L1_NORM", "ENTROPY")} | {("MMS", "GEOMETRIC_MEAN")}

PAIRS: tuple[tuple[str, str], ...] = tuple(
    (pre_op, reduction) for pre_op in PRE_OPS for reduction in REDUCTIONS if (pre_op, reduction) not in _SAME
)
"""The pre-operators and reductions that go together: the others are the same number, or none, for every block."""


@dataclass(frozen=True, kw_only=True)
class Expression:
    """A function of a block's elements: pre-operator, reduction, then at most two transforms in their order."""

    pre_op: str
    reduction: str
    transforms: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join((self.pre_op, self.reduction, *self.transforms))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The expression whose `str` is `text`; BadInput says what was expected."""
        pre_op, _, rest = text.partition("-")
        reduction, *transforms = rest.split("-")
        if (pre_op, reduction) not in PAIRS or len(transforms) > 2 or not set(transforms) <= set(TRANSFORMS):
            raise BadInput(
                f"{text!r} is not PRE_OP-REDUCTION with at most two -TRANSFORM, of {', '.join(PRE_OPS)}"
                f" (NORMALIZE with L1_NORM or ENTROPY, MMS without GEOMETRIC_MEAN); {', '.join(REDUCTIONS)};"
                f" {', '.join(TRANSFORMS)}"
            )
        return cls(pre_op=pre_op, reduction=reduction, transforms=tuple(transforms))

    def transformed(self, reduced: Float64[Tensor, " blocks"]) -> Float64[Tensor, " blocks"]:
        """The transforms of the blocks' reductions, not finite where they have no value."""
        for name in self.transforms:
            reduced = TRANSFORMS[name](reduced)
        return reduced
