"""Token ids in pre-tokenized files, and the check that a model knows them."""

import logging
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Bool, Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import read_header
from neuronal_ray.data.documents import one_line

TENSOR, MASK = "input_ids", "attention_mask"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids, and where they are padding; None where no row has any."""

    tokens: Int64[Tensor, "rows length"]
    padding: Bool[Tensor, "rows length"] | None


def read_token_rows(source: str, *, first: int | None, flag: str) -> TokenRows:
    """Read the first `first` rows (None: all) of a safetensors file's `input_ids`, or as many as there are.

    All rows where its `attention_mask` marks padding in the first ones; otherwise only these are read. Raises BadInput
    if there is no such int64 matrix, or a mask that does not fit it.
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
            mask = file.get_tensor(MASK) if MASK in names else None
            if ignored := [name for name in names if name not in (TENSOR, MASK)]:
                logger.warning("%s: %r: %r is read, ignored: %s", flag, source, TENSOR, f"{ignored!r:.200}")
            padding = None if mask is None else _padding(mask, rows.get_shape(), source, flag=flag)
            if padding is not None and padding[:first].any():
                return TokenRows(rows[:], padding)
            return TokenRows(rows[:first], None)
    except SafetensorError as error:
        raise BadInput(f"{flag}: {source!r} is not a safetensors file ({one_line(error)})") from error


def _padding(mask: Tensor, shape: list[int], source: str, *, flag: str) -> Bool[Tensor, "rows length"]:
    if list(mask.shape) != shape or not bool(((mask == 0) | (mask == 1)).all()):
        found = f"{mask.dtype} of shape {list(mask.shape)}"
        raise BadInput(f"{flag}: {MASK!r} of {source!r} is {found}, expected 0 and 1 of shape {shape}")
    return mask == 0


def check_vocabulary(tokens: Int64[Tensor, "rows length"], *, vocabulary: int, flag: str) -> None:
    """Raise BadInput if a token id is not in [0, vocabulary)."""
    unknown = tokens[(tokens < 0) | (tokens >= vocabulary)]
    if unknown.numel() > 0:
        raise BadInput(
            f"{flag}: token id {int(unknown[0])} is outside the model's vocabulary of size {vocabulary},"
            f" expected ids from 0 to {vocabulary - 1}"
        )
