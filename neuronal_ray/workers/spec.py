"""What a worker is built from, and how calibration text passes through the blocks for the final scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.core.stats import Gram, RunningGram, RunningNorm, SquareSum, Statistic

_RELEASED: dict[type[Statistic], type[Statistic]] = {SquareSum: RunningNorm, Gram: RunningGram}
"""The released code's float32 forms of the statistics."""


@dataclass(frozen=True, kw_only=True)
class WorkerSpec:
    """All that a worker is built from, wherever it runs.

    With `offload`, weights stay in the host's memory and blocks are copied to the device for their turn.
    """

    model_path: Path
    device: str
    dtype: str
    pruner: LinearPruner
    threads: int | None
    trust_remote_code: bool
    profile: bool = False
    shard: int = 0
    shards: int = 1
    offload: bool = False


@dataclass(frozen=True, kw_only=True)
class Walk:
    """How calibration text passes through the blocks for the final scores.

    `pruned`: each block sees the output of its pruned predecessors, else of the dense ones. `released`: one sequence
    at a time into the released code's statistics.
    """

    pruned: bool
    released: bool = False

    def kinds(self, wanted: Sequence[type[Statistic]]) -> tuple[type[Statistic], ...]:
        """Return the statistics `wanted`, in the released code's form where this walk is its."""
        return tuple(_RELEASED.get(kind, kind) if self.released else kind for kind in wanted)
