"""The stages of a search: their seconds, and the least operations and bytes that they need."""

from collections.abc import Mapping
from dataclasses import dataclass

from neuronal_ray.benchmark.device import Ceilings, format_flops
from neuronal_ray.core.kernels.ranking import rank_dtype
from neuronal_ray.core.layout import Layout

DENSE, STATISTICS, OTHER = "dense pass", "statistics", "other"
RANKING, MASKS, FORWARDS = "ranking", "masks", "sparse forwards"
CALIBRATION, SEARCH_TEXT, CANDIDATES = "calibration text", "search text", "candidates"


@dataclass(frozen=True, kw_only=True)
class Need:
    """Operations and bytes; 0 where they do not bound the stage."""

    flops: float = 0.0
    moved: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The seconds of a stage, and its operations and bytes."""

    name: str
    seconds: float
    flops: float
    moved: float

    @classmethod
    def of(cls, name: str, seconds: float, need: Need) -> "Stage":
        """Return the stage that took `seconds` for `need`."""
        return cls(name=name, seconds=seconds, flops=need.flops, moved=need.moved)

    def line(self, total_s: float, ceilings: Ceilings) -> str:
        """Return the stage's row of the printed table, with its shares of `total_s` and of the ceilings."""
        rates = []
        if self.flops and self.seconds:
            rate = self.flops / self.seconds
            rates.append(f"{format_flops(rate)} ({rate / ceilings.flops:.1%} of the ceiling)")
        if self.moved and self.seconds:
            rate = self.moved / self.seconds
            rates.append(f"{rate / 1e9:.3g} GB/s ({rate / ceilings.bandwidth:.1%})")
        return f"  {self.name:<28} {self.seconds:9.2f} s   {self.seconds / total_s:6.1%}   {', '.join(rates)}".rstrip()


def stage_name(activity: str, phase: str) -> str:
    """Name a worker's activity in a phase of the search; dense passes and statistics occur in several."""
    return f"{activity}, {phase}" if activity in (DENSE, STATISTICS) else activity


def needs(
    layout: Layout, *, tokens: int, calibration_tokens: int, candidates: int, item: int, rankings: int = 1
) -> Mapping[str, Need]:
    """Return each stage's need: products of prunable linears (not of attention), inputs read and outputs written once.

    Weights and activations have `item` bytes. A candidate does not need the last group's products. `rankings`: the
    number of times that all weights are ranked.
    """
    last = max(spec.reads for spec in layout.blocks[-1])
    skipped = sum(spec.rows * spec.columns for spec in layout.groups[last])
    observed = sum(specs[0].columns for specs in layout.groups.values()) * item
    ranks = sum(spec.rows * spec.columns * rank_dtype(spec.columns).itemsize for spec in layout)
    weights = layout.prunable * item
    return {
        stage_name(DENSE, CALIBRATION): Need(flops=2.0 * layout.prunable * calibration_tokens),
        stage_name(STATISTICS, CALIBRATION): Need(moved=observed * calibration_tokens),
        RANKING: Need(moved=(weights + ranks) * rankings),
        stage_name(DENSE, SEARCH_TEXT): Need(flops=2.0 * layout.prunable * tokens),
        stage_name(STATISTICS, SEARCH_TEXT): Need(moved=observed * tokens),
        MASKS: Need(moved=(2 * weights + ranks) * candidates),
        FORWARDS: Need(flops=2.0 * (layout.prunable - skipped) * tokens * candidates),
        stage_name(STATISTICS, CANDIDATES): Need(moved=observed * tokens * candidates),
    }
