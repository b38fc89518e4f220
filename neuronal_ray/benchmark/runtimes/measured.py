"""The figures of a dense and a sparse model in one runtime, and the gain of the sparse one."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

GIB = 2**30
REPEATABLE = 0.05


@dataclass(frozen=True, kw_only=True)
class Side:
    """The figures of one model; `prefill` and `decode` are tokens per second of each round, by number of sequences."""

    disk_bytes: int
    load_s: float
    peak_bytes: int
    held_bytes: int
    prefill: dict[int, list[float]]
    decode: dict[int, list[float]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A dense and a sparse model, measured in alternating rounds."""

    runtime: str
    dense: Side
    sparse: Side

    def lines(self) -> list[str]:
        """Return the lines of the printed table."""
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
    """The ratio of rates, and the threshold that it must exceed to count as a gain."""

    ratio: float
    threshold: float

    @property
    def real(self) -> bool:
        """Whether the ratio is a gain."""
        return self.ratio > self.threshold


def gain(sparse: Sequence[float], dense: Sequence[float]) -> Gain:
    """Return the median of the rounds' ratios or the ratio of the medians, whichever is less, with its threshold.

    The threshold is one plus the spread of the rounds' ratios, or plus REPEATABLE if that is more.
    """
    ratios = [rate / reference for rate, reference in zip(sparse, dense, strict=True)]
    threshold = 1 + max(spread(ratios), REPEATABLE)
    return Gain(ratio=min(median(ratios), median(sparse) / median(dense)), threshold=threshold)


def spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles over the median; 0 for one value."""
    if len(values) == 1:
        return 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / median(values)


def header(batches: Sequence[int]) -> str:
    """Return the first row of the table."""
    rates = "".join(f"{phase + ' ' + str(batch):>10}" for batch in batches for phase in ("prefill", "decode"))
    return f"{'runtime':<14} {'model':<7}{'disk':>7} {'load s':>7} {'peak':>7} {'held':>7}" + rates


def _columns(side: Side) -> list[list[float]]:
    return [rounds for batch in side.prefill for rounds in (side.prefill[batch], side.decode[batch])]
