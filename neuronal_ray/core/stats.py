"""Statistics of the inputs of linears: computed for chunks of sequences, and merged in the order of the text."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from neuronal_ray.core.kernels.squares import column_squares


@runtime_checkable
class Statistic(Protocol):
    """The interface of input statistics: `norm` is a_j, `tokens` and `sequences` are the numbers it was taken over.

    `over` replaces the number of sequences: an expert's inputs are divided by all sequences, also by those that have
    no token for it.
    """

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self: ...

    def merge(self, other: Self) -> Self: ...

    @property
    def norm(self) -> Float32[Tensor, " columns"]: ...

    @property
    def tokens(self) -> int: ...

    @property
    def sequences(self) -> int: ...

    def over(self, sequences: int) -> Self: ...

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True, eq=False)
class SquareSum:
    """Sum over tokens of each input feature's square, and the number of sequences it was taken over.

    A chunk is summed in float32; chunks are added in float64 in order, so that the result does not depend on which
    worker computed which chunk.
    """

    total: Float64[Tensor, " columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """Compute the statistic of one chunk."""
        return cls(column_squares(inputs).double(), inputs.shape[0], inputs.shape[0] * inputs.shape[1])

    def merge(self, other: Self) -> Self:
        """Return the statistic of both texts together."""
        return type(self)(self.total + other.total, self.sequences + other.sequences, self.tokens + other.tokens)

    @cached_property
    def norm(self) -> Float32[Tensor, " columns"]:
        """a_j = sqrt(sum over tokens of x_j^2 / number of sequences) (Wanda, ICLR 2024, section 3)."""
        return (self.total / self.sequences).sqrt().float()

    def over(self, sequences: int) -> Self:
        """See Statistic."""
        return replace(self, sequences=sequences)

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        return type(self)(self.total.to(device), self.sequences, self.tokens)


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums for the mean and the variance of each input feature (DSnoT), next to its sum of squares.

    `variances` is the sum over sequences of the sequence's population variance times its number of tokens.
    """

    squares: SquareSum
    total: Float64[Tensor, " columns"]
    variances: Float64[Tensor, " columns"]

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """Compute the statistic of one chunk."""
        inputs = inputs.float()
        variances = inputs.var(dim=1, correction=0).sum(dim=0)  # [sequences, tokens, columns] -> [columns]
        return cls(SquareSum.of(inputs), inputs.sum(dim=(0, 1)).double(), variances.double() * inputs.shape[1])

    def merge(self, other: Self) -> Self:
        """Return the statistic of both texts together."""
        return type(self)(self.squares.merge(other.squares), self.total + other.total, self.variances + other.variances)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """See SquareSum."""
        return self.squares.norm

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.squares.tokens

    @property
    def sequences(self) -> int:
        """Number of sequences."""
        return self.squares.sequences

    @property
    def sum(self) -> Float32[Tensor, " columns"]:
        """S_j, the sum over tokens of x_j per sequence."""
        return (self.total / self.squares.sequences).float()

    @property
    def variance(self) -> Float32[Tensor, " columns"]:
        """v_j, the mean of the sequences' population variances, weighted by tokens."""
        return (self.variances / self.tokens).float()

    def over(self, sequences: int) -> Self:
        """See Statistic."""
        return replace(self, squares=self.squares.over(sequences))

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        return type(self)(self.squares.to(device), self.total.to(device), self.variances.to(device))


@dataclass(frozen=True, eq=False)
class Gram:
    """Sum over tokens of the outer product of the inputs, float32: half the Hessian of a linear's squared error.

    Chunks are added in order. Its size is [columns, columns]: hold it for one block, never for the whole model.
    """

    total: Float32[Tensor, "columns columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """Compute the statistic of one chunk."""
        flat = inputs.float().flatten(0, 1)  # [sequences, tokens, columns] -> [all tokens, columns]
        return cls(flat.t() @ flat, inputs.shape[0], flat.shape[0])

    def merge(self, other: Self) -> Self:
        """Return the statistic of both texts together."""
        return type(self)(self.total + other.total, self.sequences + other.sequences, self.tokens + other.tokens)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """See SquareSum."""
        return (self.total.diagonal().double() / self.sequences).sqrt().float()

    def over(self, sequences: int) -> Self:
        """See Statistic."""
        return replace(self, sequences=sequences)

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        return type(self)(self.total.to(device), self.sequences, self.tokens)


@dataclass(frozen=True, eq=False)
class RunningNorm:
    """The released code's form of SquareSum: a running mean over sequences, in float32, one sequence at a time."""

    mean: Float32[Tensor, " columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """Compute the statistic of one sequence."""
        assert inputs.shape[0] == 1, inputs.shape
        norms = torch.linalg.vector_norm(inputs[0].float(), dim=0)  # [tokens, columns] -> [columns]
        return cls(norms.square(), 1, inputs.shape[1])

    def merge(self, other: Self) -> Self:
        """Add one more sequence."""
        assert other.sequences == 1, other.sequences
        count = self.sequences + 1
        mean = self.mean * (self.sequences / count) + other.mean / count
        return type(self)(mean, count, self.tokens + other.tokens)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """The square root of the mean over sequences of each feature's sum of squares."""
        return self.mean.sqrt()

    def over(self, sequences: int) -> Self:
        """Raise NotImplementedError: the released code has no experts."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        return type(self)(self.mean.to(device), self.sequences, self.tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningGram:
    """The released code's form of Gram, float32, one sequence at a time: the Hessian itself, not half of it.

    The n-th sequence is scaled by sqrt(2 / n) before it is multiplied, so the inputs of the last sequence are kept
    unscaled in `latest` until the next is merged; `mean_before` and `squares_before` cover the earlier sequences.
    """

    mean_before: Float32[Tensor, "columns columns"]
    squares_before: Float32[Tensor, " columns"]
    latest: Float32[Tensor, "last_tokens columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """Compute the statistic of one sequence."""
        assert inputs.shape[0] == 1, inputs.shape
        latest = inputs[0].to(torch.float32, copy=True)  # the model may reuse the inputs' memory
        nothing = latest.new_zeros(latest.shape[1])
        return cls(
            mean_before=nothing.expand(len(nothing), -1),
            squares_before=nothing,
            latest=latest,
            sequences=1,
            tokens=len(latest),
        )

    def merge(self, other: Self) -> Self:
        """Add one more sequence."""
        assert other.sequences == 1, other.sequences
        return type(self)(
            mean_before=self.mean,
            squares_before=self._squares,
            latest=other.latest,
            sequences=self.sequences + 1,
            tokens=self.tokens + other.tokens,
        )

    @cached_property
    def mean(self) -> Float32[Tensor, "columns columns"]:
        """The Hessian 2 / sequences * sum over tokens of the outer product of the inputs."""
        scaled = self._scaled
        return self.mean_before * self._share_before + scaled.t() @ scaled

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """sqrt(1 / sequences * sum over the sequences i = 1, 2, ... of 2 / i * sum over its tokens of x_j^2).

        Unlike the other norms it includes the scaling of the Hessian, as in the released code.
        """
        return self._squares.sqrt()

    @property
    def _squares(self) -> Float32[Tensor, " columns"]:
        norms: Tensor = torch.linalg.vector_norm(self._scaled, dim=0)  # [tokens, columns] -> [columns]
        return self.squares_before * self._share_before + norms.square().div(self.sequences)

    @property
    def _scaled(self) -> Float32[Tensor, "last_tokens columns"]:
        return torch.mul(self.latest, math.sqrt(2 / self.sequences))

    @property
    def _share_before(self) -> float:
        return (self.sequences - 1) / self.sequences

    def over(self, sequences: int) -> Self:
        """Raise NotImplementedError: the released code has no experts."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """Copy to `device`."""
        return type(self)(
            mean_before=self.mean_before.to(device),
            squares_before=self.squares_before.to(device),
            latest=self.latest.to(device),
            sequences=self.sequences,
            tokens=self.tokens,
        )
