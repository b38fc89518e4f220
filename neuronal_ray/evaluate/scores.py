"""The result of an evaluation on one text or benchmark: a number with its metric, standard error and size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PERPLEXITY = "perplexity"


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """How benchmarks run. `few_shot` None: as the task is configured; `limit` None: all rows; `data`: local rows."""

    few_shot: int | None = None
    limit: int | None = None
    data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Score:
    """`value` of `metric` over `rows`: windows of `length` tokens of a text, or questions of a benchmark.

    `window_start` is how these windows begin: papers or bos. `error` is the standard error, nan if there is none. An
    accuracy is a fraction.
    """

    metric: str
    value: float
    error: float = math.nan
    rows: int
    length: int | None = None
    window_start: str | None = None

    def value_summary(self) -> dict[str, object]:
        """Return the number alone, as in pruning.json: null for infinity, which JSON does not have."""
        known: dict[str, object] = {self.metric: self.value if math.isfinite(self.value) else None}
        return known if math.isnan(self.error) else known | {"stderr": self.error}

    def summary(self) -> dict[str, object]:
        """Return the whole score as in pruning.json."""
        if self.metric == PERPLEXITY:
            return self.value_summary() | {
                "windows": self.rows,
                "sequence_length": self.length,
                "window_start": self.window_start,
            }
        return self.value_summary() | {"rows": self.rows}


def windows_in_words(entry: Mapping[str, Any]) -> str:
    """Return the windows of a perplexity in words, from its entry of pruning.json."""
    return f"{entry['windows']} windows of {entry['sequence_length']} tokens, window start {entry['window_start']}"


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the mean over benchmarks (the paper's "Average"), with its standard error for independent tasks."""
    assert scores
    count = len(scores)
    return Score(
        metric=scores[0].metric,
        value=sum(score.value for score in scores) / count,
        error=math.sqrt(sum(score.error**2 for score in scores)) / count,
        rows=sum(score.rows for score in scores),
    )
