"""The text of the built-in model: CPython's own documentation, divided into a training and a held-out part.

The documents are the topics of `help()` and the docstrings of the standard library, so nothing is downloaded.
"""

import ast
import hashlib
import sysconfig
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

TEST_FOLDERS = {"test", "tests", "idlelib", "idle_test", "lib2to3"}
SKIPPED_FOLDERS = TEST_FOLDERS | {"pydoc_data", "site-packages", "dist-packages", "_bundled"}
HELD_OUT_RATE = 0.08
REPEAT_MIN_CHARACTERS = 60


@dataclass(frozen=True)
class Document:
    """One text and its name, which decides the part that it belongs to."""

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The two parts of the documents."""

    train: list[Document]
    held_out: list[Document]


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings of a module, its classes and its functions, in the order of `ast.walk`."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, owners)]
    return [text for text in texts if text]


def collect() -> Iterator[Document]:
    """Yield one document per topic of `help()`, then one per module of the standard library, in sorted order."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield Document(f"topic {name}", topics[name])
    root = Path(sysconfig.get_path("stdlib"))
    relative_paths = sorted(path.relative_to(root) for path in root.rglob("*.py"))
    for relative in relative_paths:
        if not SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
            texts = docstrings((root / relative).read_bytes())
            yield Document(f"module {relative.as_posix()}", "\n\n".join(texts))


def paragraphs(text: str) -> list[str]:
    """Return the blocks between blank lines, without trailing spaces."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    return [block.strip("\n") for block in "\n".join(lines).split("\n\n") if block.strip()]


def drop_repeats(documents: Iterable[Document]) -> list[Document]:
    """Keep the first copy of every paragraph, ignoring spacing; short ones may repeat in other documents."""
    seen: set[str] = set()
    kept = []
    for document in documents:
        blocks = []
        for block in paragraphs(document.text):
            key = " ".join(block.split())
            if key not in seen:
                blocks.append(block)
            if len(key) >= REPEAT_MIN_CHARACTERS:
                seen.add(key)
        if blocks:
            kept.append(Document(document.name, "\n\n".join(blocks)))
    return kept


def name_fraction(document: Document) -> float:
    """Return a number in [0, 1) that depends only on the document's name."""
    return int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64


def split(documents: list[Document]) -> Corpus:
    """Divide documents by the hashes of their names: a name is in the same part on every machine."""
    ordered = sorted(documents, key=name_fraction)
    return Corpus(
        train=[document for document in ordered if name_fraction(document) >= HELD_OUT_RATE],
        held_out=[document for document in ordered if name_fraction(document) < HELD_OUT_RATE],
    )


def join(documents: list[Document]) -> str:
    """Join documents with a blank line after each."""
    return "".join(f"{document.text}\n\n" for document in documents)


def first_fitting(documents: list[Document], *, max_bytes: int) -> list[Document]:
    """Return as many of the first documents as fit in `max_bytes` when joined, as UTF-8."""
    ends = list(accumulate(len(join([document]).encode()) for document in documents))
    return documents[: bisect_right(ends, max_bytes)]
