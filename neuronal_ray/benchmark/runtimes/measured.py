"""What was measured of a dense and a sparse model in one runtime, and whether the sparse one gains anything."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

GIB = 2**30
REPEATABLE = 0.05


@dataclass(frozen=True, kw_only=True)
class Side:
    """One model. `prefill` and `decode` are tokens per second by number of sequences, one for each round."""

    disk_bytes: int
    load_s: float
    peak_bytes: int
    held_bytes: int
    prefill: dict[int, list[float]]
    decode: dict[int, list[float]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense and a sparse model whose rounds alternated."""

    runtime: str
    dense: Side
    sparse: Side

    def lines(self) -> list[str]:
        """The rows of the printed table."""
        rows = []
        for name, side in (("dense", self.dense), ("sparse", self.sparse)):
            rates = [f"{median(rounds):10.2f}" for rounds in _columns(side)]
            memory = f"{side.peak_bytes / GIB:7.2f} {side.held_bytes / GIB:7.2f}"
            sizes = f"{side.disk_bytes / GIB:7.3f} {side.load_s:7.2f} {memory}"
            rows.append(f"{self.runtime if name == 'dense' else '':<14} {name:<7}{sizes}" + "".join(rates))
        both = zip(_columns(self.sparse), _columns(self.dense), strict=True)
        gains = [gain(sparse, dense) for sparse, dense in both]
        cells = [f"{found.ratio:10.2f}" if found.real else f"{'no gain':>10}" for found in gains]
        limits = [f"{found.threshold:10.2f}" for found in gains]
        return [
            *rows,
            f"{'':<15}{'sparse / dense':<38}" + "".join(cells),
            f"{'':<15}{'gain if above':<38}" + "".join(limits),
        ]

    @property
    def repeatability(self) -> float:
        """The largest half distance between the quartiles of a decode rate, over its median."""
        return max(spread(rounds) / 2 for side in (self.dense, self.sparse) for rounds in side.decode.values())


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much faster, and what that must exceed to be called a gain."""

    ratio: float
    threshold: float

    @property
    def real(self) -> bool:
        """Whether it is a gain."""
        return self.ratio > self.threshold


def gain(sparse: Sequence[float], dense: Sequence[float]) -> Gain:
    """Of rates measured side by side: the median of the rounds' ratios or the ratio of the medians, whichever is less.

    The threshold is one plus the spread of the rounds' ratios, or what any figure here may be off by if that is more.
    """
    ratios = [one / other for one, other in zip(sparse, dense, strict=True)]
    threshold = 1 + max(spread(ratios), REPEATABLE)
    return Gain(ratio=min(median(ratios), median(sparse) / median(dense)), threshold=threshold)


def spread(values: Sequence[float]) -> float:
    """The distance between the quartiles over the median; 0 of one value."""
    if len(values) == 1:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / median(values)


def header(batches: Sequence[int]) -> str:
    """The first row of the table."""
    rates = "".join(f"{phase + ' ' + str(batch):>10}" for batch in batches for phase in ("prefill", "decode"))
    return f"{'runtime':<14} {'model':<7}{'disk':>7} {'load s':>7} {'peak':>7} {'held':>7}" + rates


def _columns(side: Side) -> list[list[float]]:
    return [rounds for batch in side.prefill for rounds in (side.prefill[batch], side.decode[batch])]
