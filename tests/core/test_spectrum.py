"""The exponent of a spectrum's tail equals its formula at every cut-off."""

import math

import numpy as np
import pytest
import torch

from neuronal_ray.core import spectrum
from neuronal_ray.core.spectrum import eigenvalues, hill_estimates, ks_distances, peak, tail_exponent

SHAPES = [(24, 24), (12, 40), (40, 12), (65, 64), (3, 200)]


def weight_of(rows: int, columns: int, *, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Random, with columns of very different size: a spectrum with a tail."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return scale * weight * torch.logspace(-1.5, 0.5, columns)[torch.randperm(columns, generator=generator)]


def literal_eigenvalues(weight: torch.Tensor) -> list[float]:
    singular = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    return sorted(float(value) ** 2 for value in singular)


def literal_alpha(values: list[float], cutoff: int) -> float:
    n = len(values) - cutoff
    return 1 + n / (sum(math.log(value) for value in values[cutoff:]) - n * math.log(values[cutoff]))


def literal_ks(values: list[float], cutoff: int, alpha: float) -> float:
    n = len(values) - cutoff
    worst = 0.0
    for k in range(cutoff, len(values)):
        power_law = 1 - (values[k] / values[cutoff]) ** (1 - alpha)
        worst = max(worst, abs(power_law - (k - cutoff) / n))
    return worst


def literal_peak(values: list[float]) -> float:
    counts, edges = np.histogram([math.log10(value) for value in values], bins=100)
    return 10 ** float(edges[int(np.argmax(counts))])


def literal_exponent(values: list[float], bound: str) -> float:
    x = literal_peak(values)
    lowest = 0.95 * x if bound == "strict" else math.log10(0.95 * x)
    best, exponent = math.inf, math.nan
    for cutoff in range(len(values) - 1):
        if not lowest <= values[cutoff] <= 1.5 * x:
            continue
        alpha = literal_alpha(values, cutoff)
        if alpha > 1 and literal_ks(values, cutoff, alpha) < best:
            best, exponent = literal_ks(values, cutoff, alpha), alpha
    return exponent


@pytest.mark.parametrize("shape", SHAPES)
def test_eigenvalues_are_the_squares_of_all_singular_values(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape, seed=1)
    found = eigenvalues(weight)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(literal_eigenvalues(weight), rel=1e-10)


def test_what_is_zero_up_to_rounding_is_no_eigenvalue() -> None:
    weight = weight_of(24, 30, seed=2)
    padded = torch.cat([weight, weight[:5], torch.zeros(3, 30)])  # rank 24 of 32 rows, 30 columns
    found = eigenvalues(padded)
    assert len(found) == 24
    assert found.tolist() == pytest.approx(literal_eigenvalues(padded)[-24:], rel=1e-9)
    for bound in spectrum.BOUNDS:
        exponent = tail_exponent(found, bound=bound)
        assert exponent is not None
        assert math.isfinite(exponent)


@pytest.mark.parametrize("seed", range(5))
def test_estimates_and_distances_are_the_formula_at_every_cutoff(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectrum, "_CHUNK_SIZE", 7 * 30)  # several chunks, the last one short
    values = eigenvalues(weight_of(30, 47, seed=seed))
    wanted = [literal_alpha(values.tolist(), cutoff) for cutoff in range(29)]
    alphas = hill_estimates(values)
    assert alphas.tolist() == pytest.approx(wanted, rel=1e-10)
    distances = ks_distances(values, alphas, torch.arange(29))
    assert distances.tolist() == pytest.approx(
        [literal_ks(values.tolist(), cutoff, wanted[cutoff]) for cutoff in range(29)], abs=1e-10
    )
    some = torch.tensor([2, 3, 11, 28])
    assert ks_distances(values, alphas[some], some).tolist() == pytest.approx(distances[some].tolist(), abs=1e-12)


@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
@pytest.mark.parametrize("bound", spectrum.BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_exponent_is_that_of_a_loop_over_cutoffs(shape: tuple[int, int], bound: str, scale: float) -> None:
    for seed in range(4):
        weight = weight_of(*shape, seed=seed, scale=scale)
        found = tail_exponent(eigenvalues(weight), bound=bound)
        assert found == pytest.approx(literal_exponent(literal_eigenvalues(weight), bound), rel=1e-6), seed


def test_the_published_bound_lets_smaller_eigenvalues_in() -> None:
    differing = 0
    for seed in range(10):
        values = eigenvalues(weight_of(40, 60, seed=seed, scale=0.1))  # below 1: every logarithm is below them all
        strict, compat = (tail_exponent(values, bound=bound) for bound in ("strict", "compat"))
        differing += strict != compat
    assert differing > 0


@pytest.mark.parametrize(("start", "reached"), [(1.49, True), (1.51, False)])
def test_cutoffs_end_at_one_and_a_half_times_the_peak(start: float, reached: bool) -> None:
    quantiles = torch.arange(100, dtype=torch.float64) / 100
    crowd = torch.linspace(1.0, 1.001, 30, dtype=torch.float64)
    values = torch.cat([crowd, start * (1 - quantiles) ** (-1 / 1.5)])  # the best cut-off is where the law starts
    at_start = literal_alpha(values.tolist(), 30)
    assert (tail_exponent(values, bound="strict") == pytest.approx(at_start, rel=1e-9)) == reached


def test_of_equally_full_bins_the_lowest_is_the_peak() -> None:
    values = torch.logspace(0, 3, 4, dtype=torch.float64)
    assert peak(values) == pytest.approx(1.0)
    assert peak(torch.cat([values, values[2:3] * 1.001]).sort().values) == pytest.approx(
        10 ** (0.03 * 66)
    )  # 10 ** 2 is in bin 66


def test_a_power_law_gives_its_exponent_back() -> None:
    quantiles = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for alpha in (1.8, 2.5, 4.0):
        values = (1 - quantiles) ** (-1 / (alpha - 1))  # density ~ value^-alpha from 1 on
        found = tail_exponent(values, bound="strict")
        assert found == pytest.approx(alpha, rel=0.02)


def test_the_exponent_does_not_depend_on_the_unit() -> None:
    values = eigenvalues(weight_of(32, 50, seed=3))
    found = tail_exponent(values, bound="strict")
    assert tail_exponent(values * 4096, bound="strict") == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize("bound", spectrum.BOUNDS)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(8, 12), torch.ones(8, 12), 3.7 * torch.eye(9), torch.ones(1, 5)],
    ids=["zero", "rank 1", "scaled identity", "one row"],
)
def test_a_spectrum_without_a_tail_has_no_exponent(weight: torch.Tensor, bound: str) -> None:
    assert tail_exponent(eigenvalues(weight), bound=bound) is None


def test_the_weight_is_left_alone() -> None:
    weight = weight_of(12, 9, seed=4)
    before = weight.clone()
    values = eigenvalues(weight)
    kept = values.clone()
    tail_exponent(values, bound="compat")
    assert torch.equal(weight, before)
    assert torch.equal(values, kept)
