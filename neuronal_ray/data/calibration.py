"""The token sequences that a model is calibrated on."""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.documents import Documents
from neuronal_ray.data.draw import Draw, Rule, draw_windows, num_distinct
from neuronal_ray.data.encoder import Encoder
from neuronal_ray.data.text import calibration_documents, is_tokenized
from neuronal_ray.data.tokens import MASK, check_vocabulary, read_token_rows
from neuronal_ray.data.window_start import WithoutBos, begin_with_bos

FLAG = "--calibration"
AUTO, ON, OFF = "auto", "on", "off"
RELEASED = "released"
"""The draw of the released code: nothing is packed, and sequences may be drawn again."""
PACKINGS = (AUTO, ON, OFF, RELEASED)
_OVERLAP = 0.9
"""`auto` packs when fewer than this fraction of the drawn tokens would be different ones."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The sequences, how many of them differ, and whether short documents were joined for them."""

    tokens: Int64[Tensor, "samples sequence_length"]
    distinct: int
    packed: bool


def calibration_tokens(
    source: str,
    encode: Encoder,
    *,
    samples: int,
    sequence_length: int,
    seed: int,
    vocabulary: int,
    packing: str = AUTO,
    bos: int | None = None,
    columns: tuple[str, ...] = (),
) -> Calibration:
    """Draw sequences from a source as Wanda's (ICLR 2024) data loader does; see `draw_windows`.

    Differs: a sequence is not drawn twice, and short documents may be joined, unless `packing` is "released". The first
    k sequences equal a draw of k with the same packing. With `bos`, each is this token and a draw of one token less. A
    safetensors source is not sampled: its first rows are used as they are, in order, whatever the seed, without what
    its `attention_mask` marks as padding.
    Raises BadInput for a source that cannot be read, has too few sequences or ids outside [0, vocabulary).
    """
    assert sequence_length > 0
    assert packing in PACKINGS
    if samples < 1:
        raise BadInput(f"--calibration-samples: {samples} leaves {FLAG} empty, expected at least 1")
    packed = False
    if is_tokenized(source):
        tokens, packed = _first_rows(source, samples=samples, sequence_length=sequence_length)
        if packing == ON:
            logger.warning("--calibration-packing: ignored, the sequences of %r are used as they are", source)
    else:
        documents = calibration_documents(source, encode, flag=FLAG, columns=columns)
        if documents.count == 0:
            raise BadInput(f"{FLAG}: {source!r} is empty, expected at least one document")
        text = encode if bos is None else WithoutBos(encode, bos)
        length = sequence_length if bos is None else sequence_length - 1
        drawing = _Source(source, documents, text, samples=samples, length=length, seed=seed, bos=bos)
        draw, packed = drawing.draw(packing)
        tokens = torch.stack(draw.windows)
        tokens = tokens if bos is None else begin_with_bos(tokens, bos)
    check_vocabulary(tokens, vocabulary=vocabulary, flag=FLAG)
    distinct = num_distinct(tokens)
    if distinct < samples:
        logger.warning("%s: only %d of the %d sequences from %r are distinct", FLAG, distinct, samples, source)
    return Calibration(tokens=tokens, distinct=distinct, packed=packed)


def _first_rows(
    source: str, *, samples: int, sequence_length: int
) -> tuple[Int64[Tensor, "samples sequence_length"], bool]:
    """Return the first rows, and whether they were joined."""
    found = read_token_rows(source, first=samples, flag=FLAG)
    if found.padding is not None:
        return _without_padding(found.tokens, ~found.padding, source, samples=samples, length=sequence_length)
    tokens = found.tokens
    rows, length = tokens.shape
    if length != sequence_length:
        raise BadInput(
            f"{FLAG}: the rows of {source!r} have {length} tokens, expected --sequence-length {sequence_length}"
        )
    if rows < samples:
        raise BadInput(f"{FLAG}: {source!r} has {rows} rows, expected at least --calibration-samples {samples}")
    return tokens, False


def _without_padding(
    rows: Int64[Tensor, "rows row_length"],
    real: Bool[Tensor, "rows row_length"],
    source: str,
    *,
    samples: int,
    length: int,
) -> tuple[Int64[Tensor, "samples sequence_length"], bool]:
    """Return sequences of the real tokens alone: the rows where all have as many, else these tokens joined."""
    counts = real[:samples].sum(1).unique().tolist()
    if len(rows) >= samples and len(counts) == 1 and 2 <= counts[0] <= length:
        logger.warning(
            "%s: the rows of %r have %d tokens without padding and are used so; --sequence-length %d is ignored",
            FLAG,
            source,
            counts[0],
            length,
        )
        return rows[:samples][real[:samples]].view(samples, counts[0]), False
    tokens = rows[real]  # [rows, row_length] -> [tokens]
    available = len(tokens) // length
    if available < samples:
        raise BadInput(
            f"{FLAG}: {source!r} has {len(tokens)} tokens without those that its {MASK} leaves out, which make"
            f" {available} sequences of --sequence-length {length}, expected --calibration-samples {samples}"
        )
    logger.warning("%s: the rows of %r have padding; their other tokens are joined to sequences", FLAG, source)
    return tokens[: samples * length].view(samples, length), True


class _Source:
    """A source of which sequences are drawn, packed or not."""

    def __init__(
        self,
        name: str,
        documents: Documents,
        encode: Encoder,
        *,
        samples: int,
        length: int,
        seed: int,
        bos: int | None,
    ) -> None:
        self._name, self._documents, self._encode = name, documents, encode
        self._samples, self._length, self._seed, self._bos = samples, length, seed, bos

    def draw(self, packing: str) -> tuple[Draw, bool]:
        """Return the draw, and whether it is packed. Raises BadInput when there are too few sequences."""
        if self._documents.continuous and packing == ON:
            logger.warning("--calibration-packing: ignored, %r is one text", self._name)
        if packing == ON and not self._documents.continuous:
            return self._checked(self._windows(Rule(packed=True, start=self._bos)), packing), True
        may_pack = packing == AUTO and not self._documents.continuous
        alone = self._windows(Rule(repeats=packing == RELEASED, patient=not may_pack))
        few = self._overlaps(alone) and alone.short > alone.long
        if few and may_pack:
            packed = self._windows(Rule(packed=True, start=self._bos))
            if len(packed.windows) == self._samples:
                logger.warning(
                    "--calibration-packing auto: on, %d of the %d documents of %r that were drawn are not longer than "
                    "--sequence-length %d; they are joined",
                    packed.short,
                    packed.short + packed.long,
                    self._name,
                    self._length,
                )
                return packed, True
            if len(alone.windows) < self._samples:
                return self._checked(packed, ON), True
        self._checked(alone, packing)
        if few and packing != RELEASED:
            logger.warning(
                "%s: the %d sequences from %r have only %s different tokens of %s, because most documents are not "
                "longer than --sequence-length %d; --calibration-packing on joins them",
                FLAG,
                self._samples,
                self._name,
                f"{alone.covered:,}",
                f"{self._samples * self._length:,}",
                self._length,
            )
        return alone, False

    def _windows(self, rule: Rule) -> Draw:
        return draw_windows(
            self._documents, self._encode, rule, samples=self._samples, length=self._length, seed=self._seed
        )

    def _overlaps(self, draw: Draw) -> bool:
        return draw.covered < _OVERLAP * self._samples * self._length

    def _checked(self, draw: Draw, packing: str) -> Draw:
        """Return `draw` if it is complete. Raises BadInput with the number of sequences that there are."""
        found = len(draw.windows)
        if found == self._samples:
            return draw
        short = packing == OFF and draw.short > 0 and not self._documents.continuous
        hint = "; --calibration-packing on joins short documents" if short else ""
        if found == 0 and packing == ON:
            raise BadInput(
                f"{FLAG}: {self._name!r} is too short, its documents have {draw.tokens} tokens in all,"
                f" expected at least --sequence-length {self._length}"
            )
        if found == 0:
            raise BadInput(
                f"{FLAG}: {self._name!r} is too short, its longest document has {draw.longest} tokens,"
                f" expected more than --sequence-length {self._length}{hint}"
            )
        raise BadInput(
            f"{FLAG}: {self._name!r} has only {found} distinct sequences of --sequence-length {self._length} tokens,"
            f" expected --calibration-samples {self._samples}; give more text or --calibration-samples {found}{hint}"
        )
