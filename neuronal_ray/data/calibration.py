"""The token sequences that a model is calibrated on."""

import random
from collections.abc import Callable

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.text import Documents, calibration_documents, is_tokenized
from neuronal_ray.data.tokens import check_vocabulary, read_token_rows
from neuronal_ray.data.window_start import begin_with_bos, without_bos

FLAG = "--calibration"


def calibration_tokens(
    source: str,
    encode: Callable[[str], list[int]],
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    vocabulary: int,
    bos: int | None = None,
) -> Int64[Tensor, "samples sequence_length"]:
    """Draw sequences from a source as Wanda's (ICLR 2024) data loader does.

    The first k sequences equal a draw of k. With `bos`, each is this token and a draw of one token less. A safetensors
    source is not sampled: its first rows are used as they are, in order, whatever the seed.
    Raises BadInput for a source that cannot be read, is too short or has ids outside [0, vocabulary).
    """
    assert sequence_length > 0
    if samples < 1:
        raise BadInput(f"--calibration-samples: {samples} leaves {FLAG} empty, expected at least 1")
    if is_tokenized(source):
        tokens = _first_rows(source, samples=samples, sequence_length=sequence_length)
    else:
        documents = calibration_documents(source, flag=FLAG)
        if documents.count == 0:
            raise BadInput(f"{FLAG}: {source!r} is empty, expected at least one document")
        tokens = _draw(
            documents,
            encode if bos is None else without_bos(encode, bos),
            source=source,
            samples=samples,
            sequence_length=sequence_length if bos is None else sequence_length - 1,
            seed=seed,
        )
        tokens = tokens if bos is None else begin_with_bos(tokens, bos)
    check_vocabulary(tokens, vocabulary=vocabulary, flag=FLAG)
    return tokens


def _first_rows(source: str, *, samples: int, sequence_length: int) -> Int64[Tensor, "samples sequence_length"]:
    tokens = read_token_rows(source, first=samples, flag=FLAG)
    rows, length = tokens.shape
    if length != sequence_length:
        raise BadInput(
            f"{FLAG}: the rows of {source!r} have {length} tokens, expected --sequence-length {sequence_length}"
        )
    if rows < samples:
        raise BadInput(f"{FLAG}: {source!r} has {rows} rows, expected at least --calibration-samples {samples}")
    return tokens


def _draw(
    documents: Documents,
    encode: Callable[[str], list[int]],
    *,
    source: str,
    samples: int,
    sequence_length: int,
    seed: int,
) -> Int64[Tensor, "samples sequence_length"]:
    """Draw, for each sample in turn, documents until one is longer than a sequence, then a start in it.

    A document is tokenized when it is first drawn; for documents that are too short only the index is kept.
    """
    generator = random.Random(seed)
    accepted: dict[int, Tensor] = {}
    rejected: set[int] = set()
    longest = 0
    sequences: list[Tensor] = []
    while len(sequences) < samples:
        index = 0 if documents.continuous else generator.randint(0, documents.count - 1)
        if index in rejected:
            continue
        if index not in accepted:
            document = encode(documents.read(index))
            if len(document) <= sequence_length:
                rejected.add(index)
                longest = max(longest, len(document))
                if len(rejected) == documents.count:
                    raise BadInput(
                        f"{FLAG}: {source!r} is too short, its longest document has {longest} tokens,"
                        f" expected more than --sequence-length {sequence_length}"
                    )
                continue
            accepted[index] = torch.tensor(document, dtype=torch.int64)
        start = generator.randint(0, len(accepted[index]) - sequence_length - 1)
        sequences.append(accepted[index][start : start + sequence_length])
    return torch.stack(sequences)
