"""Token ids in pre-tokenized files, and the check that a model knows them."""

from pathlib import Path

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import read_header
from neuronal_ray.data.documents import one_line

TENSOR = "input_ids"


def read_token_rows(source: str, *, first: int | None, flag: str) -> Int64[Tensor, "rows length"]:
    """Read the first `first` rows (None: all) of a safetensors file's `input_ids`, or as many as there are.

    Only these rows are read. Raises BadInput if there is no such int64 matrix.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(source)
    read_header(path, flag=flag)
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if TENSOR not in names:
                found = f"{len(names)} tensors, first {names[:3]}"
                raise BadInput(f"{flag}: {source!r} has {found}, expected one named {TENSOR!r}")
            rows = file.get_slice(TENSOR)
            if rows.get_dtype() != "I64" or len(rows.get_shape()) != 2:
                found = f"{rows.get_dtype()} {rows.get_shape()}"
                expected = "I64 (int64) of shape [rows, sequence length]"
                raise BadInput(f"{flag}: {TENSOR!r} of {source!r} is {found}, expected {expected}")
            tokens: Int64[Tensor, "rows length"] = rows[:first]
    except SafetensorError as error:
        raise BadInput(f"{flag}: {source!r} is not a safetensors file ({one_line(error)})") from error
    return tokens


def check_vocabulary(tokens: Int64[Tensor, "rows length"], *, vocabulary: int, flag: str) -> None:
    """Raise BadInput if a token id is not in [0, vocabulary)."""
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if unknown.numel() > 0:
        raise BadInput(
            f"{flag}: token id {int(unknown[0])} is outside the model's vocabulary of size {vocabulary},"
            f" expected ids from 0 to {vocabulary - 1}"
        )
