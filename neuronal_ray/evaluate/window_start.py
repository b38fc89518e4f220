"""The choice of --window-start: what the tokenizer allows, and which start the dense model reads a text better with."""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.progress import Progress
from neuronal_ray.cli.read_files import read_json
from neuronal_ray.data.text import is_tokenized
from neuronal_ray.data.window_start import AUTO, BOS, FLAG, PAPERS, begin_with_bos
from neuronal_ray.evaluate.perplexity import perplexity
from neuronal_ray.models.bos_token import bos_token
from neuronal_ray.workers.pools.protocol import Pool

READ = 4
"""The number of windows that the choice is made on."""
_SHORTEST = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Readings:
    """The dense model's perplexity of the same tokens, read without and with BOS in front of each window."""

    papers: float
    bos: float

    @property
    def better(self) -> str:
        """The start that the model reads the text better with: without BOS where both are equal."""
        return BOS if self.bos < self.papers else PAPERS


@dataclass(frozen=True, kw_only=True)
class WindowStart:
    """How windows of text begin: papers or bos, or auto until the dense model has read a few windows both ways.

    `bos` is the id of the token that windows begin with, where they do or may.
    """

    used: str
    bos: int | None = None
    readings: Readings | None = None

    @property
    def token(self) -> int | None:
        """The token in front of each window."""
        return self.bos if self.used == BOS else None

    def of(self, source: str) -> str:
        """Return how the rows of a source begin: those of a tokenized file are used as they are."""
        return PAPERS if is_tokenized(source) else self.used

    def decided(self, readings: Readings) -> Self:
        """Return the better start."""
        return replace(self, used=readings.better, readings=readings)

    def summary(self) -> dict[str, object]:
        """Return the choice as in pruning.json; `perplexity` is null where nothing was measured."""
        if self.readings is None:
            return {"used": self.used, "perplexity": None}
        measured = {PAPERS: self.readings.papers, BOS: self.readings.bos}
        known = {start: value if math.isfinite(value) else None for start, value in measured.items()}
        return {"used": self.used, "perplexity": known}

    def __str__(self) -> str:
        if self.readings is None:
            return self.used
        return f"{self.used} (perplexity without BOS {self.readings.papers:.2f}, with it {self.readings.bos:.2f})"


def possible_start(
    asked: str, sources: Sequence[str], path: Path, *, length: int, trust_remote_code: bool
) -> WindowStart:
    """Return what `asked` comes to for these sources: auto remains only where the tokenizer in `path` adds BOS.

    Sequences of `length` 2 have nothing to compare. Raises BadInput where BOS is asked for and the tokenizer has none.
    """
    if asked == PAPERS or all(map(is_tokenized, sources)):
        return WindowStart(used=PAPERS)
    token = bos_token(path, trust_remote_code=trust_remote_code)
    if asked == BOS and token.id is None:
        raise BadInput(f"{FLAG}: bos, but the tokenizer in {path} has no BOS token; expected papers or auto")
    if asked == AUTO and (not token.added or length < _SHORTEST):
        return WindowStart(used=PAPERS)
    return WindowStart(used=asked, bos=token.id)


def warn_of_tokenized(sources: Iterable[str]) -> None:
    """Warn that --window-start has no effect on rows of token ids."""
    for source in sources:
        if is_tokenized(source):
            logger.warning("%s: ignored for %r, whose rows of token ids are used as they are", FLAG, source)


def recorded_start(path: Path) -> str | None:
    """Return the window start of the run that wrote the model in `path`; None where no pruning.json says so.

    Runs that do not say it are older than the choice: they had the papers' start.
    """
    file = path / "pruning.json"
    if not file.exists():
        return None
    document = read_json(file, dict[str, Any], flag="--model")
    if "evaluation" not in document:
        return None  # of another program
    used = document.get("window_start", {"used": PAPERS})
    if not isinstance(used, dict) or used.get("used") not in (PAPERS, BOS):
        raise BadInput(f"--model: 'window_start' in {file} is {used!r:.60}, expected 'used' to be papers or bos")
    return str(used["used"])


def read_both(pool: Pool, windows: Int64[Tensor, "windows length"], start: WindowStart, progress: Progress) -> Readings:
    """Read the first few windows without and with BOS in front, and return the perplexities of the same tokens.

    The first token of a window is not read (it may be BOS), the second is not predicted (nothing is before it).
    """
    assert windows.shape[1] >= _SHORTEST
    text = windows[:READ, 1:]
    without = perplexity(pool, text, None, progress=progress, stage="window start: papers")
    assert start.bos is not None
    begun = begin_with_bos(text, start.bos)
    with_bos = perplexity(pool, begun, None, skip=1, progress=progress, stage="window start: bos")
    return Readings(papers=without, bos=with_bos)
