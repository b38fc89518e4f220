"""The Parquet files of runs and sweeps: columns and types, each written here once."""

from dataclasses import dataclass
from types import NoneType
from typing import Annotated, Any, get_args, get_type_hints

import pyarrow as pa
from pydantic import Field, StringConstraints

CellId = Annotated[str, StringConstraints(pattern=r"^(dense-)?[0-9a-f]{12}$")]
"""The name of a cell, which files are called by: nothing else in a journal or a table becomes part of a path."""

Real = Annotated[float, Field(ge=-1e100, le=1e100, allow_inf_nan=False)]
"""A number that can be drawn."""
Rate = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Count = Annotated[int, Field(ge=0)]

ALLOCATION = pa.schema(
    [
        ("block", pa.int32()),
        ("path", pa.string()),
        ("rows", pa.int32()),
        ("columns", pa.int32()),
        ("pruned", pa.int64()),
        ("row_pruned", pa.list_(pa.int32())),
    ]
)
"""allocation.parquet, and the plans of a sweep: one row per linear."""

SEARCH = pa.schema(
    [
        ("step", pa.string()),
        ("lambda", pa.float64()),
        ("criterion", pa.string()),
        ("score", pa.float64()),
        ("selected", pa.bool_()),
        ("seconds", pa.float64()),
    ]
)
"""search.parquet: one row per candidate, in the order tried."""

DENSE = "dense"
"""Method and variant of the rows that the dense model has in a sweep's results."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One row of search.parquet: `lam` is the candidate's lambda or number; a lower `score` is better."""

    step: str
    lam: Real
    criterion: str
    score: float
    seconds: Seconds
    selected: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of a sweep's results: one cell and evaluation.

    `value` is None where `problem` says why. `rows` are windows or questions. `window_start` is how windows begin:
    papers or bos; None for benchmarks, and for results that are older than this choice. `seconds` is the time of
    allocation and refinement without the method's own statistics and ranking; trials that an earlier cell has run count
    as if they had been repeated. `evaluation_seconds` is the time of this evaluation.
    """

    cell: CellId
    variant: str
    model: str
    method: str
    allocation: str
    row_step: str | None
    refinement: str
    pattern: str
    mode: str
    criterion: str
    sparsity: Rate
    achieved: Rate
    seed: int
    calibration: str
    calibration_samples: Count
    search_samples: Count
    sequence_length: Count
    block_lambda: Real | None
    row_lambda: Real | None
    evaluation: str
    metric: str
    value: Real | None
    error: Real | None
    rows: Count
    window_start: str | None = None
    dense: Real | None
    seconds: Seconds
    search_seconds: Seconds
    evaluation_seconds: Seconds
    peak_bytes: Count
    device: str
    problem: str | None
    config: str
    versions: str

    def __post_init__(self) -> None:
        """Raise ValueError for a perplexity that no model can have."""
        for name, value in (("value", self.value), ("dense", self.dense)):
            if self.metric == "perplexity" and value is not None and value <= 0:
                raise ValueError(f"{name} is a perplexity of {value:g}, expected more than 0")

    @property
    def start(self) -> str:
        """How the windows of a perplexity begin, "" for a benchmark: values of different starts are not compared."""
        return (self.window_start or "papers") if self.metric == "perplexity" else ""


_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def _type_of(hint: Any) -> pa.DataType:
    """Return the column type of a field; a field that may be None is null there."""
    (kind,) = [option for option in get_args(hint) or (hint,) if option is not NoneType]
    return _TYPES[kind]


RESULTS = pa.schema([(name, _type_of(hint)) for name, hint in get_type_hints(Result).items()])
"""results/*.parquet of a sweep: the fields of Result."""

MAY_BE_NULL = frozenset(name for name, hint in get_type_hints(Result).items() if NoneType in get_args(hint))
"""The columns of RESULTS that may have nulls."""
