"""Input statistics of linears as monoids: `of` one chunk of sequences, `merge` two, in the order of the text."""

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor


@runtime_checkable
class Statistic(Protocol):
    """What every input statistic can do; `norm` is a_j, float32 [columns]."""

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self: ...

    def merge(self, other: Self) -> Self: ...

    @property
    def norm(self) -> Float32[Tensor, " columns"]: ...

    def to(self, device: torch.device) -> Self: ...


@dataclass(frozen=True, eq=False)
class SquareSum:
    """Sum over tokens of each input feature's square, and the number of sequences it was taken over.

    A chunk is summed in float32, chunks are added in float64 in their order, so that the result does not
    depend on who computed which chunk.
    """

    total: Float64[Tensor, " columns"]
    sequences: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one chunk."""
        squares = inputs.float().square().sum(dim=(0, 1))  # [sequences, tokens, columns] -> [columns]
        return cls(squares.double(), inputs.shape[0])

    def merge(self, other: Self) -> Self:
        """The statistic of both texts together."""
        return type(self)(self.total + other.total, self.sequences + other.sequences)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """a_j = sqrt(sum over tokens of x_j^2 / number of sequences) (Wanda, ICLR 2024, section 3)."""
        return (self.total / self.sequences).sqrt().float()

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(self.total.to(device), self.sequences)


@dataclass(frozen=True, eq=False)
class RunningNorm:
    """The released code's form of the same: a running mean over sequences, in float32, one sequence at a time."""

    mean: Float32[Tensor, " columns"]
    sequences: int

    @classmethod
    def of(cls, inputs: Float[Tensor, "sequences tokens columns"]) -> Self:
        """The statistic of one sequence."""
        assert inputs.shape[0] == 1, inputs.shape
        norms = torch.linalg.vector_norm(inputs[0].float(), dim=0)  # [tokens, columns] -> [columns]
        return cls(norms.square(), 1)

    def merge(self, other: Self) -> Self:
        """The statistic with one more sequence."""
        assert other.sequences == 1, other.sequences
        count = self.sequences + 1
        return type(self)(self.mean * (self.sequences / count) + other.mean / count, count)

    @property
    def norm(self) -> Float32[Tensor, " columns"]:
        """The square root of the mean over sequences of each feature's sum of squares."""
        return self.mean.sqrt()

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        return type(self)(self.mean.to(device), self.sequences)
