"""DSA's operators equal their formulas, also when merged from pieces, and expressions have unique names."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.operators import (
    NEEDS_TERMS,
    PAIRS,
    PRE_OPS,
    REDUCTIONS,
    TERMS,
    TRANSFORMS,
    Expression,
    Extent,
    Summary,
)


def some_elements(seed: int, *, rows: int = 5, columns: int = 7, positive: bool = True) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return values.abs() + 0.01 if positive else values


def literal_pre_op(name: str, scores: Sequence[float]) -> list[float]:
    mean = sum(scores) / len(scores)
    deviation = math.sqrt(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
    formulas = {
        "NO_OP": lambda x: x,
        "ABSLOG": lambda x: math.log(abs(x)) if x != 0 else 0.0,
        "POW": lambda x: x * x,
        "EXP": math.exp,
        "SIGMOID": lambda x: 1 / (1 + math.exp(-x)),
        "TANH": math.tanh,
        "NORMALIZE": lambda x: (x - mean) / deviation,
        "MMS": lambda x: (x - min(scores)) / (max(scores) - min(scores) + 1e-9),
    }
    return [formulas[name](score) for score in scores]


def literal_reduction(name: str, values: Sequence[float]) -> float:
    count = len(values)
    mean = sum(values) / count
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    if name == "ENTROPY":
        kept = [value for value in values if value >= 0]
        shares = [value / sum(kept) for value in kept]
        return -sum(share * math.log(share) for share in shares if share > 0)
    if name == "GEOMETRIC_MEAN":
        return math.prod(values) ** (1 / count) if min(values) >= 0 else math.nan
    return {
        "MEAN": mean,
        "VAR": variance,
        "STD": math.sqrt(variance),
        "FROBENIUS_NORM": math.sqrt(sum(value * value for value in values)),
        "L1_NORM": sum(abs(value) for value in values) / count,
    }[name]


LITERAL_TRANSFORMS = {
    "SIN": np.sin,
    "COS": np.cos,
    "TAN": np.tan,
    "ASIN": np.arcsin,
    "ACOS": np.arccos,
    "ATAN": np.arctan,
    "EXP": np.exp,
    "LOG": np.log,
    "ABS": np.abs,
    "SIGMOID": lambda x: 1 / (1 + np.exp(-x)),
    "TANH": np.tanh,
    "SOFTPLUS": lambda x: np.logaddexp(0, x),
}


def extent_of(scores: torch.Tensor) -> Extent:
    exact = scores.double()
    return Extent(
        mean=float(exact.mean()), deviation=float(exact.std()), lowest=float(exact.min()), highest=float(exact.max())
    )


@pytest.mark.parametrize("name", PRE_OPS)
@given(seed=st.integers(0, 1000))
def test_a_pre_operator_is_its_formula(name: str, seed: int) -> None:
    scores = some_elements(seed)
    scores[1, 2] = 0.0
    before = scores.clone()
    found = PRE_OPS[name](scores, extent_of(scores))
    wanted = torch.tensor(literal_pre_op(name, scores.flatten().tolist())).view_as(scores)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("name", REDUCTIONS)
@given(seed=st.integers(0, 1000), split=st.integers(1, 4))
def test_a_reduction_is_its_formula_however_the_rows_are_split(
    name: str, positive: bool, seed: int, split: int
) -> None:
    values = some_elements(seed, positive=positive)
    terms = NEEDS_TERMS.get(name, ())
    wanted = literal_reduction(name, values.flatten().tolist())
    whole = Summary.of(values, terms=terms)
    parts = Summary.of(values[:split], terms=terms).merge(Summary.of(values[split:], terms=terms))
    for summary in (whole, parts):
        assert float(REDUCTIONS[name](summary)) == pytest.approx(wanted, rel=2e-5, nan_ok=True)


@given(seed=st.integers(0, 1000))
def test_the_order_of_merging_is_rounding_only(seed: int) -> None:
    first, second, third = (Summary.of(some_elements(seed + shift), terms=TERMS) for shift in range(3))
    left, right = first.merge(second).merge(third), first.merge(second.merge(third))
    assert left.count == right.count == 105
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(left.squares, right.squares, rtol=1e-12, atol=0)
    for term in TERMS:
        torch.testing.assert_close(left.terms[term], right.terms[term], rtol=1e-12, atol=0)


def test_the_variance_survives_a_large_mean() -> None:
    deviations = torch.tensor([[-1.0, 1.0, 0.0, 2.0], [-2.0, 3.0, -3.0, 0.0]])
    values = 4096.0 + deviations / 64  # exact in float32; the mean of squares is not
    summary = Summary.of(values[:1]).merge(Summary.of(values[1:]))
    assert float(REDUCTIONS["VAR"](summary)) == pytest.approx(4.0 / 4096, rel=1e-4)


def test_one_element_has_no_variance_and_no_mass_no_entropy() -> None:
    assert math.isnan(REDUCTIONS["VAR"](Summary.of(torch.ones(1, 1))))
    assert math.isnan(REDUCTIONS["ENTROPY"](Summary.of(torch.zeros(2, 2), terms=("mass", "mass_log"))))


def test_equal_elements_are_normalized_to_0() -> None:
    scores = torch.full((2, 3), 0.7)
    assert torch.equal(PRE_OPS["NORMALIZE"](scores, extent_of(scores)), torch.zeros(2, 3))
    assert torch.equal(PRE_OPS["MMS"](scores, extent_of(scores)), torch.zeros(2, 3))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_its_formula_and_has_its_domain(name: str) -> None:
    values = np.array([-1.5, -1.0, -0.3, 0.0, 0.4, 1.0, 1.2, 3.0])
    with np.errstate(all="ignore"):
        wanted = LITERAL_TRANSFORMS[name](values)
    found = TRANSFORMS[name](torch.from_numpy(values))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-12, nan_ok=True)


@given(pair=st.sampled_from(PAIRS), transforms=st.lists(st.sampled_from(list(TRANSFORMS)), max_size=2).map(tuple))
def test_an_expression_is_found_again_by_its_text(pair: tuple[str, str], transforms: tuple[str, ...]) -> None:
    expression = Expression(pre_op=pair[0], reduction=pair[1], transforms=transforms)
    assert Expression.parse(str(expression)) == expression


def test_transforms_are_applied_in_their_order() -> None:
    values = torch.tensor([0.2, 1.2], dtype=torch.float64)
    found = Expression.parse("ABSLOG-VAR-ATAN-ASIN").transformed(values)
    assert found.tolist() == pytest.approx([math.asin(math.atan(0.2)), math.asin(math.atan(1.2))])
    assert Expression.parse("ABSLOG-VAR").transformed(values) is values


@pytest.mark.parametrize(
    "text", ["", "ABSLOG", "VAR-ABSLOG", "ABSLOG-VAR-", "ABSLOG-VAR-SIN-COS-TAN", "NORMALIZE-VAR", "abslog-var"]
)
def test_an_invalid_expression_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is not PRE_OP-REDUCTION"):
        Expression.parse(text)
