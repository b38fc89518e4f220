"""The Parquet files of runs and sweeps: columns and types, each written here once."""

from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

import pyarrow as pa

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
    lam: float
    criterion: str
    score: float
    seconds: float
    selected: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of a sweep's results: one cell and evaluation.

    `value` is None where `problem` says why. `rows` are windows or questions. `seconds` is the time of allocation and
    refinement without the method's own statistics and ranking; trials that an earlier cell has run count as if they
    had been repeated. `evaluation_seconds` is the time of this evaluation.
    """

    cell: str
    variant: str
    model: str
    method: str
    allocation: str
    row_step: str | None
    refinement: str
    pattern: str
    mode: str
    criterion: str
    sparsity: float
    achieved: float
    seed: int
    calibration: str
    calibration_samples: int
    search_samples: int
    sequence_length: int
    block_lambda: float | None
    row_lambda: float | None
    evaluation: str
    metric: str
    value: float | None
    error: float | None
    rows: int
    dense: float | None
    seconds: float
    search_seconds: float
    evaluation_seconds: float
    peak_bytes: int
    device: str
    problem: str | None
    config: str
    versions: str


_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}


def _type_of(hint: Any) -> pa.DataType:
    """Return the column type of a field; a field that may be None is null there."""
    (kind,) = [option for option in get_args(hint) or (hint,) if option is not NoneType]
    return _TYPES[kind]


RESULTS = pa.schema([(name, _type_of(hint)) for name, hint in get_type_hints(Result).items()])
"""results/*.parquet of a sweep: the fields of Result."""
