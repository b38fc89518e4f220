"""Input statistics of linears as monoids: `of` one chunk of sequences, `merge` two, in the order of the text."""

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
    """What every input statistic can do; `norm` is a_j, float32 [columns], `tokens` how many it was taken over.

    `over` is the same said to be of so many sequences: of an expert's inputs, which not every sequence reaches.
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

    A chunk is summed in float32, chunks are added in float64 in their order, so that the result does not
    depend on who computed which chunk.
    """

    total: Float64[Tensor, " columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one chunk."""
        return cls(column_squares(inputs).double(), inputs.shape[0], inputs.shape[0] * inputs.shape[1])

    def merge(self, other: Self) -> Self:
        """The statistic of both texts together."""
        return type(self)(self.total + other.total, self.sequences + other.sequences, self.tokens + other.tokens)

    @cached_property
    def norm(self) -> Float32[Tensor, " columns"]:
        """a_j = sqrt(sum over tokens of x_j^2 / number of sequences) (Wanda, ICLR 2024, section 3)."""
        return (self.total / self.sequences).sqrt().float()

    def over(self, sequences: int) -> Self:
        """See Statistic."""
        return replace(self, sequences=sequences)

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(self.total.to(device), self.sequences, self.tokens)


@dataclass(frozen=True, eq=False)
class Moments:
    """What the mean and the variance of each input feature need besides its sum of squares (DSnoT).

    `variances` is the sum over sequences of a sequence's population variance times its tokens.
    """

    squares: SquareSum
    total: Float64[Tensor, " columns"]
    variances: Float64[Tensor, " columns"]

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one chunk."""
        inputs = inputs.float()
        variances = inputs.var(dim=1, correction=0).sum(dim=0)  # [sequences, tokens, columns] -> [columns]
        return cls(SquareSum.of(inputs), inputs.sum(dim=(0, 1)).double(), variances.double() * inputs.shape[1])

    def merge(self, other: Self) -> Self:
        """The statistic of both texts together."""
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
        """The same on `device`."""
        return type(self)(self.squares.to(device), self.total.to(device), self.variances.to(device))


@dataclass(frozen=True, eq=False)
class Gram:
    """Sum over tokens of the outer product of the inputs, float32: half the Hessian of a linear's squared error.

    Chunks are added in their order. [columns, columns]: hold it for one block, never for the model.
    """

    total: Float32[Tensor, "columns columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one chunk."""
        flat = inputs.float().flatten(0, 1)  # [sequences, tokens, columns] -> [all tokens, columns]
        return cls(flat.t() @ flat, inputs.shape[0], flat.shape[0])

    def merge(self, other: Self) -> Self:
        """The statistic of both texts together."""
        return type(self)(self.total + other.total, self.sequences + other.sequences, self.tokens + other.tokens)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """See SquareSum."""
        return (self.total.diagonal().double() / self.sequences).sqrt().float()

    def over(self, sequences: int) -> Self:
        """See Statistic."""
        return replace(self, sequences=sequences)

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(self.total.to(device), self.sequences, self.tokens)


@dataclass(frozen=True, eq=False)
class RunningNorm:
    """The released code's form of the same: a running mean over sequences, in float32, one sequence at a time."""

    mean: Float32[Tensor, " columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one sequence."""
        assert inputs.shape[0] == 1, inputs.shape
        norms = torch.linalg.vector_norm(inputs[0].float(), dim=0)  # [tokens, columns] -> [columns]
        return cls(norms.square(), 1, inputs.shape[1])

    def merge(self, other: Self) -> Self:
        """The statistic with one more sequence."""
        assert other.sequences == 1, other.sequences
        count = self.sequences + 1
        mean = self.mean * (self.sequences / count) + other.mean / count
        return type(self)(mean, count, self.tokens + other.tokens)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """The square root of the mean over sequences of each feature's sum of squares."""
        return self.mean.sqrt()

    def over(self, sequences: int) -> Self:
        """The released code has no experts."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(self.mean.to(device), self.sequences, self.tokens)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningGram:
    """The released code's form of Gram, float32, one sequence at a time: the Hessian itself, not half of it.

    The n-th sequence is scaled by sqrt(2 / n) before it is multiplied, so the inputs of the last one are kept as they
    came until the next is merged; `mean_before` and `squares_before` are those of the sequences before it.
    """

    mean_before: Float32[Tensor, "columns columns"]
    squares_before: Float32[Tensor, " columns"]
    latest: Float32[Tensor, "last_tokens columns"]
    sequences: int
    tokens: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one sequence."""
        assert inputs.shape[0] == 1, inputs.shape
        latest = inputs[0].to(torch.float32, copy=True)  # a copy: the model may go on in this memory
        nothing = latest.new_zeros(latest.shape[1])
        return cls(
            mean_before=nothing.expand(len(nothing), -1),
            squares_before=nothing,
            latest=latest,
            sequences=1,
            tokens=len(latest),
        )

    def merge(self, other: Self) -> Self:
        """The statistic with one more sequence."""
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

        Differs: from every other norm, as in the released code, where the scaling of the Hessian enters it.
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
        """The released code has no experts."""
        raise NotImplementedError

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(
            mean_before=self.mean_before.to(device),
            squares_before=self.squares_before.to(device),
            latest=self.latest.to(device),
            sequences=self.sequences,
            tokens=self.tokens,
        )
