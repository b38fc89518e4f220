"""Power-law exponent of the tail of a weight matrix's spectrum, by Hill's estimate.

Eigenvalues are those of the smaller Gram matrix of the weight: N positive numbers in ascending order. A cut-off i
defines the tail as the n = N - i eigenvalues from position i on. Lu et al., AlphaPruning, NeurIPS 2024.
"""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

BOUNDS = ("strict", "compat")

_BINS = 100
_NARROWEST, _WIDEST = 0.95, 1.5  # cut-offs lie between these multiples of the spectrum's peak
_STRIDE = 32
_CHUNK_SIZE = 2**16  # elements of an intermediate result, half a megabyte


def eigenvalues(weight: Float[Tensor, "rows columns"]) -> Float64[Tensor, " eigenvalues"]:
    """Return the squared singular values of `weight`, ascending, without those that are 0 up to rounding.

    Values up to max(rows, columns) * 2^-52 times the largest are within its error and dropped; a zero weight has none.
    Differs: the authors keep all float32 singular values, and a zero makes their estimate NaN.
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.t()
    wide = wide.double()
    squares: Tensor = torch.linalg.eigvalsh(wide @ wide.t())  # [smaller, smaller] -> [smaller]
    noise = squares[-1] * (max(weight.shape) * torch.finfo(torch.float64).eps)
    return squares[squares > noise]


def peak(spectrum: Float64[Tensor, " eigenvalues"]) -> float:
    """Return where the spectrum is densest: the lower edge of the fullest of 100 bins of log10, the first of equals."""
    logs = spectrum.log10()
    low, width = logs[0], (logs[-1] - logs[0]) / _BINS
    if not bool(width > 0):
        return float(spectrum[0])
    bins = ((logs - low) / width).long().clamp(max=_BINS - 1)  # the largest falls into the last bin
    fullest = bins.bincount(minlength=_BINS).argmax()
    return float(10 ** (low + fullest * width))


def hill_estimates(spectrum: Float64[Tensor, " eigenvalues"]) -> Float64[Tensor, " cutoffs"]:
    """Return alpha_i = 1 + n / (sum over the tail of ln lambda_k - n * ln lambda_i) for all cut-offs but the last.

    Above 1; infinite where all values of the tail are equal.
    """
    logs = spectrum.log()
    tails = torch.arange(len(logs), 0, -1, dtype=torch.float64, device=logs.device)  # n of every cut-off
    # The sum grows by (n - 1) * (ln lambda_i+1 - ln lambda_i) from cut-off i + 1 to i: no difference of large sums.
    excess = (logs.diff() * tails[1:]).flip(0).cumsum(0).flip(0)
    return 1 + tails[:-1] / excess


def ks_distances(
    spectrum: Float64[Tensor, " eigenvalues"],
    alphas: Float64[Tensor, " chosen"],
    cutoffs: Int64[Tensor, " chosen"],
    *,
    stride: int = 1,
) -> Float64[Tensor, " chosen"]:
    """Return the Kolmogorov-Smirnov distance between the tail of each cut-off and the power law of its exponent.

    KS_i = max over k >= i of |1 - (lambda_k / lambda_i)^(1 - alpha_i) - (k - i) / n|; `cutoffs` ascending. With a
    `stride` above 1 only every `stride`-th k is evaluated, which gives a lower bound.
    """
    logs = spectrum.log()
    positions = torch.arange(len(logs), dtype=torch.float64, device=logs.device)
    chunk = max(1, _CHUNK_SIZE // -(-len(logs) // stride))
    largest = []
    for some, exponents in zip(cutoffs.split(chunk), (1 - alphas).split(chunk), strict=True):
        lowest = int(some[0]) // stride * stride  # the tails of the chunk begin here or above
        survival = (logs[lowest::stride] - logs[some, None]).mul_(exponents[:, None]).exp_()  # [chunk, tail]
        steps = positions[lowest::stride] - positions[some, None]  # k - i, [chunk, tail]
        below = steps < 0
        distances = steps.div_(len(logs) - positions[some, None]).add_(survival).sub_(1).abs_()
        largest.append(distances.masked_fill_(below, 0.0).amax(dim=1))  # [chunk, tail] -> [chunk]
    return torch.cat(largest)


def tail_exponent(spectrum: Float64[Tensor, " eigenvalues"], *, bound: str) -> float | None:
    """Return Hill's alpha at the cut-off of least KS distance, the lowest of equals; None when there is no cut-off.

    Cut-offs are the eigenvalues from 0.95 x to 1.5 x, x the peak, except the largest and those whose estimate is
    infinite. `compat` begins at log10(0.95 x): the authors' code compares this logarithm with eigenvalues, and its
    published numbers were computed that way.
    """
    assert bound in BOUNDS, bound
    if len(spectrum) < 2:
        return None
    alphas = hill_estimates(spectrum)
    densest = spectrum.new_tensor(peak(spectrum))
    lowest = _NARROWEST * densest
    if bound == "compat":
        lowest = lowest.log10()
    inside = (spectrum[:-1] >= lowest) & (spectrum[:-1] <= _WIDEST * densest) & alphas.isfinite()
    cutoffs = inside.nonzero().flatten()  # [cut-offs, 1] -> [cut-offs]
    if len(cutoffs) == 0:
        return None
    bounds = ks_distances(spectrum, alphas[cutoffs], cutoffs, stride=_STRIDE)
    likely = cutoffs[bounds.argmin(keepdim=True)]
    cutoffs = cutoffs[bounds <= ks_distances(spectrum, alphas[likely], likely)]  # no other can have the least distance
    best = ks_distances(spectrum, alphas[cutoffs], cutoffs).argmin()  # the first of equals
    return float(alphas[cutoffs[best]])
