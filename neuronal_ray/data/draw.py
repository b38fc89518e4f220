"""Windows of tokens drawn from documents: without repeating one, or with repetitions as the released code draws."""

import random
from dataclasses import dataclass, field

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.data.documents import Documents
from neuronal_ray.data.encoder import Encoder

_FRUITLESS = 10_000
"""How many short documents in a row end a draw that may be replaced by a packed one."""
_MIX, _BASE = -0x61C8864680B583EB, 0x2545F4914F6CDD1D
_INVERSE = pow(_BASE, -1, 2**64)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The windows that were drawn, and what was seen of the documents meanwhile.

    `short` and `long` count the documents that were tokenized: up to a window's length, and beyond. `longest` and
    `tokens` are the length of the longest of them and of all short ones. `covered` are the different tokens in windows
    of long documents and the tokens in packed ones.
    """

    windows: list[Int64[Tensor, " length"]]
    short: int
    long: int
    longest: int
    tokens: int
    covered: int


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How windows are drawn.

    `repeats`: a window may be drawn again. `packed`: short documents are joined rather than passed over. `patient`:
    every document is looked at before the draw ends with too few windows. `start`: a token that will be put in front of
    each window, so that no packed one begins with it.
    """

    repeats: bool = False
    packed: bool = False
    patient: bool = True
    start: int | None = None


def draw_windows(documents: Documents, encode: Encoder, rule: Rule, *, samples: int, length: int, seed: int) -> Draw:
    """Draw `samples` windows of `length` tokens, or all there are.

    As Wanda's (ICLR 2024) data loader does: documents until one is longer than a window, then a start in it. Where that
    window was drawn before, one is drawn from those of the document that were not. Packed documents, in the order in
    which they are drawn, make one text that is cut into windows; a document is in it once.
    The first k windows equal a draw of k under the same rule.
    """
    drawing = _Drawing(documents, encode, rule, length=length, seed=seed)
    while len(drawing.windows) < samples and drawing.go_on():
        drawing.step()
    del drawing.windows[samples:]
    return Draw(
        windows=drawing.windows,
        short=drawing.short,
        long=len(drawing.long),
        longest=drawing.longest,
        tokens=drawing.tokens,
        covered=length * drawing.num_packed + sum(_covered(found.starts, length) for found in drawing.long.values()),
    )


def num_distinct(windows: Int64[Tensor, "windows length"]) -> int:
    """Return how many rows differ from all rows before them."""
    return len(windows.unique(dim=0)) if windows.numel() else 0


@dataclass(frozen=True)
class _Long:
    """A document that is longer than a window, and the starts of the windows drawn from it."""

    tokens: Int64[Tensor, " tokens"]
    starts: list[int] = field(default_factory=list)


class _Drawing:
    """A draw that is under way. A document is tokenized when it is first drawn; only long ones are kept."""

    def __init__(self, documents: Documents, encode: Encoder, rule: Rule, *, length: int, seed: int) -> None:
        self._documents, self._encode, self._rule, self._length = documents, encode, rule, length
        self._generator = random.Random(seed)
        self._done: set[int] = set()  # documents that have no further window
        self._seen: set[int] = set()
        self._keys: dict[int, Int64[Tensor, " starts"]] = {}
        self._pending: list[int] = []
        self._fruitless = 0
        self.long: dict[int, _Long] = {}
        self.windows: list[Int64[Tensor, " length"]] = []
        self.short = self.longest = self.tokens = self.num_packed = 0

    def go_on(self) -> bool:
        """Return whether there may be another window."""
        return len(self._done) < self._documents.count and (self._rule.patient or self._fruitless < _FRUITLESS)

    def step(self) -> None:
        """Draw a document, and a window from it if it is long."""
        index = 0 if self._documents.continuous else self._generator.randint(0, self._documents.count - 1)
        if index in self._done:
            return
        if index not in self.long:
            tokens = self._encode(self._documents.read(index))
            self.longest = max(self.longest, len(tokens))
            if len(tokens) <= self._length:
                self._done.add(index)
                self._pass_over(tokens)
                return
            self.long[index] = _Long(torch.tensor(tokens, dtype=torch.int64))
        self._fruitless = 0
        self._draw_from(index)

    def _pass_over(self, tokens: list[int]) -> None:
        """Count a short document, and join it to those before it."""
        self.short += 1
        self._fruitless += 1
        self.tokens += len(tokens)
        if not self._rule.packed or not tokens:
            return
        self._pending += tokens + self._encode.end_of_document()
        while len(self._pending) >= self._length:
            window = torch.tensor(self._pending[: self._length], dtype=torch.int64)
            del self._pending[: self._length]
            while self._pending and self._pending[0] == self._rule.start:
                del self._pending[0]
            if self._is_new(window):
                self.windows.append(window)
                self.num_packed += 1

    def _draw_from(self, index: int) -> None:
        found = self.long[index]
        start = self._generator.randint(0, len(found.tokens) - self._length - 1)  # the last start is left out, as there
        if not self._rule.repeats and not self._is_new(found.tokens[start : start + self._length]):
            fresh = self._fresh_starts(index)
            if not len(fresh):
                self._done.add(index)
                return
            start = int(fresh[self._generator.randint(0, len(fresh) - 1)])
            self._is_new(found.tokens[start : start + self._length])
        found.starts.append(start)
        self.windows.append(found.tokens[start : start + self._length])

    def _is_new(self, window: Int64[Tensor, " length"]) -> bool:
        """Return whether a window was not drawn before, and note it."""
        key = int(_window_keys(window, self._length))
        new = key not in self._seen
        self._seen.add(key)
        return new

    def _fresh_starts(self, index: int) -> Int64[Tensor, " fresh"]:
        """Return the starts of windows of a document that were not drawn, there or elsewhere."""
        if index not in self._keys:
            self._keys[index] = _window_keys(self.long[index].tokens, self._length)[:-1]
        return (~torch.isin(self._keys[index], torch.tensor(list(self._seen)))).nonzero().flatten()


def _window_keys(tokens: Int64[Tensor, " tokens"], length: int) -> Int64[Tensor, " starts"]:
    """Return a 64-bit hash of each window of `length` tokens: a polynomial of the mixed ids, modulo 2^64."""
    mixed = (tokens + 1) * _MIX
    mixed = (mixed ^ (mixed >> 29)) * _BASE
    powers = torch.full_like(tokens, _BASE).cumprod(0)
    sums = torch.cat([tokens.new_zeros(1), (mixed * powers).cumsum(0)])  # [tokens] -> [tokens + 1]
    inverse = _INVERSE - 2**64 if _INVERSE >= 2**63 else _INVERSE
    shifts = torch.full_like(sums[length:], inverse).cumprod(0)
    return (sums[length:] - sums[:-length]) * shifts


def _covered(starts: list[int], length: int) -> int:
    """Return how many different tokens the windows at `starts` have."""
    ordered = sorted(starts)
    return sum(min(length, after - start) for start, after in zip(ordered, [*ordered[1:], 2**63], strict=False))
