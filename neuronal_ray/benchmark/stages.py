"""The stages of a search: how long each took, and the least operations and bytes that it must do and move."""

from collections.abc import Mapping
from dataclasses import dataclass

from neuronal_ray.benchmark.device import Ceilings, said_flops
from neuronal_ray.core.kernels.ranking import rank_dtype
from neuronal_ray.core.layout import Layout

DENSE, STATISTICS, OTHER = "dense pass", "statistics", "other"
RANKING, MASKS, FORWARDS = "ranking", "masks", "sparse forwards"
CALIBRATION, SEARCH_TEXT, CANDIDATES = "calibration text", "search text", "candidates"


@dataclass(frozen=True, kw_only=True)
class Need:
    """Operations and bytes; 0 where a stage is not about them."""

    flops: float = 0.0
    moved: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage's seconds, and what it had to do."""

    name: str
    seconds: float
    flops: float
    moved: float

    @classmethod
    def of(cls, name: str, seconds: float, need: Need) -> "Stage":
        """A stage that took `seconds` for `need`."""
        return cls(name=name, seconds=seconds, flops=need.flops, moved=need.moved)

    def line(self, total_s: float, ceilings: Ceilings) -> str:
        """Its row of the printed table, with the share of `total_s` and of the ceilings."""
        rates = []
        if self.flops and self.seconds:
            rate = self.flops / self.seconds
            rates.append(f"{said_flops(rate)} ({rate / ceilings.flops:.1%} of the ceiling)")
        if self.moved and self.seconds:
            rate = self.moved / self.seconds
            rates.append(f"{rate / 1e9:.3g} GB/s ({rate / ceilings.bandwidth:.1%})")
        return f"  {self.name:<28} {self.seconds:9.2f} s   {self.seconds / total_s:6.1%}   {', '.join(rates)}".rstrip()


def stage_name(activity: str, phase: str) -> str:
    """What a worker's activity is called in a phase of the search; dense passes and statistics are in several."""
    return f"{activity}, {phase}" if activity in (DENSE, STATISTICS) else activity


def needs(
    layout: Layout, *, tokens: int, calibration_tokens: int, candidates: int, item: int, rankings: int = 1
) -> Mapping[str, Need]:
    """By stage: products of prunable linears (not of attention), and each input read and each output written once.

    `item` bytes a weight and an activation. A candidate does not need the last group's products. `rankings`: how often
    all is ranked.
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
