"""What an evaluation gives: one number with its name, error and size, of a text or of a benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PERPLEXITY = "perplexity"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """How benchmarks are run. `few_shot` None: as the task's own configuration says; `limit` None: all rows."""

    few_shot: int | None = None
    limit: int | None = None
    data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """`value` by `metric` over `rows` (windows of `length` tokens of a text, questions of a benchmark).

    `error` is the standard error, nan where there is none. An accuracy is a fraction.
    """

    metric: str
    value: float
    error: float = math.nan
    rows: int
    length: int | None = None

    def value_summary(self) -> dict[str, object]:
        """The number alone as pruning.json has it: null for one that overflowed, which JSON has no number for."""
        known: dict[str, object] = {self.metric: self.value if math.isfinite(self.value) else None}
        return known if math.isnan(self.error) else known | {"stderr": self.error}

    def summary(self) -> dict[str, object]:
        """All of it as pruning.json has it."""
        if self.metric == PERPLEXITY:
            return self.value_summary() | {"windows": self.rows, "sequence_length": self.length}
        return self.value_summary() | {"rows": self.rows}


def mean_score(scores: Sequence[Score]) -> Score:
    """The mean of benchmarks' values, the paper's "Average", and its standard error, tasks taken as independent."""
    assert scores
    count = len(scores)
    return Score(
        metric=scores[0].metric,
        value=sum(score.value for score in scores) / count,
        error=math.sqrt(sum(score.error**2 for score in scores)) / count,
        rows=sum(score.rows for score in scores),
    )
