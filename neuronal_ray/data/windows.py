"""The token windows that perplexity is measured on."""

import logging
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.encoder import Encoder
from neuronal_ray.data.file_formats import name_of
from neuronal_ray.data.text import NAMES, evaluation_text, is_file_name, is_tokenized
from neuronal_ray.data.tokens import MASK, check_vocabulary, read_token_rows
from neuronal_ray.data.window_start import WithoutBos, begin_with_bos

FLAG = "--evaluate"

logger = logging.getLogger(__name__)


def evaluation_windows(
    source: str,
    encode: Encoder,
    *,
    sequence_length: int,
    vocabulary: int,
    bos: int | None = None,
    columns: tuple[str, ...] = (),
) -> Int64[Tensor, "windows sequence_length"]:
    """Tokenize a source and divide it into consecutive windows, dropping the remainder (GPTQ, ICLR 2023).

    With `bos`, each window is this token and `sequence_length` - 1 tokens of the text.
    The rows of a safetensors source are the windows; their length takes precedence over `sequence_length`.
    Raises BadInput for a source that cannot be read, is too short or has ids outside [0, vocabulary).
    """
    assert sequence_length > 0
    if is_tokenized(source):
        windows = _stored_windows(source, sequence_length=sequence_length)
    else:
        windows = _consecutive_windows(source, encode, sequence_length=sequence_length, bos=bos, columns=columns)
    check_vocabulary(windows, vocabulary=vocabulary, flag=FLAG)
    return windows


def evaluation_name(source: str) -> str:
    """Return the name of a source in results: the bare name of a file or directory, or the name itself."""
    if is_file_name(source):
        return name_of(Path(source))
    return Path(source).name if source not in NAMES and Path(source).is_dir() else source


def _stored_windows(source: str, *, sequence_length: int) -> Int64[Tensor, "windows length"]:
    found = read_token_rows(source, first=None, flag=FLAG)
    if found.padding is not None:
        raise BadInput(
            f"{FLAG}: the {MASK} of {source!r} leaves out {int(found.padding.sum())} tokens,"
            " expected rows without padding"
        )
    windows = found.tokens
    rows, length = windows.shape
    if rows == 0 or length < 2:
        raise BadInput(f"{FLAG}: {source!r} has {rows} rows of {length} tokens, expected at least 1 row of 2 tokens")
    if length != sequence_length:
        logger.warning(
            "%s: the rows of %r have %d tokens and are used as they are; --sequence-length %d is ignored",
            FLAG,
            source,
            length,
            sequence_length,
        )
    return windows


def _consecutive_windows(
    source: str, encode: Encoder, *, sequence_length: int, bos: int | None, columns: tuple[str, ...]
) -> Int64[Tensor, "windows sequence_length"]:
    evaluation = evaluation_text(source, encode, flag=FLAG, columns=columns)
    tokens = encode(evaluation.text) if bos is None else WithoutBos(encode, bos)(evaluation.text)
    length = sequence_length if bos is None else sequence_length - 1  # of the text in a window
    available = len(tokens) // length
    if available == 0:
        raise BadInput(
            f"{FLAG}: {source!r} has {len(tokens)} tokens, expected at least one window of"
            f" --sequence-length {sequence_length}"
        )
    count = available if evaluation.windows is None else min(available, evaluation.windows)
    windows = torch.tensor(tokens[: count * length], dtype=torch.int64).view(count, length)
    # [windows * length] -> [windows, length] -> [windows, sequence_length]
    return windows if bos is None else begin_with_bos(windows, bos)
