"""DSA's operators, which transform the elements of a block, reduce them to one number, and transform that number.

Names and formulas are those of the released search space (Li et al., DSA, NeurIPS 2024, section 3).
Differs: it omits operators that equal another one on scores, which are never negative (ABS is NO_OP, LOG is ABSLOG
up to a term of 1e-6), operators that need a matrix where the released code passes a vector (GRAM, CORREF, DIAGONAL,
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
    """Number, mean, sum of squared deviations and sums of TERMS of some elements.

    The values stay on the elements' device, so that computing them does not synchronize.
    """

    count: int
    mean: Scalar
    squares: Scalar
    terms: Mapping[str, Scalar]

    @classmethod
    def of(cls, values: Elements, *, terms: Collection[str] = ()) -> Self:
        """Summarize one tensor, in two passes to avoid cancellation in the squares."""
        mean = _sum(values) / values.numel()
        squares = _sum((values - mean).square_())
        return cls(
            count=values.numel(), mean=mean, squares=squares, terms={name: _sum(TERMS[name](values)) for name in terms}
        )

    def merge(self, other: Self) -> Self:
        """Return the summary of both sets of elements together (Chan et al., 1983, equation 1.5)."""
        count = self.count + other.count
        apart = other.mean - self.mean
        return type(self)(
            count=count,
            mean=self.mean + apart * (other.count / count),
            squares=self.squares + other.squares + apart * apart * (self.count * other.count / count),
            terms={name: total + other.terms[name] for name, total in self.terms.items()},
        )


def _sum(values: Elements) -> Scalar:
    """Sum rows in float32 and the rows' sums in float64, without an intermediate copy of the tensor."""
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
"""Functions that some reductions sum over the elements; NaN for the log of a negative element."""


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Statistics of the elements of a whole block, for normalizing; the deviation is over count - 1."""

    mean: float
    deviation: float
    lowest: float
    highest: float


def _abslog(scores: Elements, _: Extent | None) -> Elements:
    """Return ln|x|, and 0 where x is 0."""
    return scores.abs().log_().masked_fill_(scores == 0, 0.0)


def _normalize(scores: Elements, extent: Extent | None) -> Elements:
    """Return (x - mean) / deviation, 0 where all elements are equal."""
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
"""Functions from elements (float32 [rows, columns]) and, for those in NEEDS_EXTENT, the block's extent to elements."""

NEEDS_EXTENT = frozenset({"NORMALIZE", "MMS"})


def _variance(elements: Summary) -> Scalar:
    """Divide by count - 1, as torch.var does."""
    return elements.squares / (elements.count - 1)


def _geometric_mean(elements: Summary) -> Scalar:
    """Return exp of the mean ln: 0 if an element is 0, NaN if one is negative.

    Differs: the released code takes the root of the product, which overflows or underflows in float32.
    """
    return (elements.terms["log"] / elements.count).exp()


def _entropy(elements: Summary) -> Scalar:
    """Return the entropy in nats of the non-negative elements x / S, S their sum: ln S - (sum of x ln x) / S."""
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
"""Functions from the summary of a block's elements to one number; not finite where undefined."""

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
"""Functions from one number per block to another; not finite outside their domain (asin above 1, log of 0)."""

_SAME = {("NORMALIZE", name) for name in REDUCTIONS if name not in ("L1_NORM", "ENTROPY")} | {("MMS", "GEOMETRIC_MEAN")}

PAIRS: tuple[tuple[str, str], ...] = tuple(
    (pre_op, reduction) for pre_op in PRE_OPS for reduction in REDUCTIONS if (pre_op, reduction) not in _SAME
)
"""The useful combinations of pre-operator and reduction: the others give every block the same number, or none."""


@dataclass(frozen=True, kw_only=True)
class Expression:
    """A function of a block's elements: pre-operator, reduction, then at most two transforms in order."""

    pre_op: str
    reduction: str
    transforms: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join((self.pre_op, self.reduction, *self.transforms))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the expression whose `str` is `text`. Raises BadInput for any other text."""
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
        """Apply the transforms to the blocks' reductions; not finite where undefined."""
        for name in self.transforms:
            reduced = TRANSFORMS[name](reduced)
        return reduced
