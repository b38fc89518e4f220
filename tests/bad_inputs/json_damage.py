"""What makes any JSON file unreadable, whatever it should hold; and values of the wrong type at a key."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=6),
)
JSON = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1), inner, max_size=3)
)
"""Any JSON value, small."""


def drawn(strategy: st.SearchStrategy[Any], count: int, *, number: int) -> list[Any]:
    """About `count` examples of a strategy, always the same; `number` is the seed."""
    found: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count, database=None, phases=[Phase.generate], deadline=None, verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def wrong_types(kind: type | tuple[type, ...], count: int, *, number: int) -> list[Any]:
    """JSON values that are none of `kind`; a Boolean is no number, an integer is a float."""
    kinds = kind if isinstance(kind, tuple) else (kind,)

    def is_wrong(value: object) -> bool:
        if isinstance(value, bool):
            return bool not in kinds
        if isinstance(value, int) and float in kinds:
            return False
        return not isinstance(value, kinds)

    return _distinct(drawn(JSON.filter(is_wrong), count, number=number))


def _distinct(values: list[Any]) -> list[Any]:
    return list({json.dumps(value): value for value in values}.values())


def text_damages(*, key: str | None = None) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Ways to make a JSON object no strict JSON object; `key` is one of its own, for a second time."""

    def with_entry(entry: str) -> Callable[[bytes], bytes]:
        return lambda content: content.strip()[:-1].rstrip() + f", {entry}}}".encode("utf-8", "surrogatepass")

    for what, replacement in {
        "empty": b"",
        "blank": b" \n",
        "a word": b"model",
        "brackets": b"{]",
        "null": b"null",
        "a number": b"3",
        "a string": b'"text"',
        "a list": b"[]",
        "a list of lists": b"[[], []]",
        "true": b"true",
        "NaN": b"NaN",
        "latin 1": '{"caf\xe9": 1}'.encode("latin-1"),
        "bytes": bytes(range(256)),
        "zeros": bytes(400),
        "lists too deep": b"[" * 100_000,
        "objects too deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "an html page": b"<html><body>404</body></html>",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
    }.items():
        yield what, lambda _, replacement=replacement: replacement  # type: ignore[misc]
    yield "cut in half", lambda content: content[: len(content) // 2]
    yield "cut at the end", lambda content: content.rstrip()[:-1]
    yield "followed by more", lambda content: content + b"{}"
    yield "written twice", lambda content: content + content
    yield "UTF-16", lambda content: content.decode().encode("utf-16")
    yield "not UTF-8 inside", lambda content: content.replace(b'"', b'"\xff', 1)
    yield "a NUL inside", lambda content: content.replace(b'"', b'"\0', 1)
    yield "a comment", lambda content: b"// settings\n" + content
    yield "a comma too many", lambda content: content.rstrip()[:-1].rstrip() + b",}"
    yield "a deep entry", with_entry('"more": ' + "[" * 50_000 + "]" * 50_000)
    if key is not None:
        yield "a key twice", with_entry(f'"{key}": 1')


def strict_damages() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """What is JSON for Python, but no strict JSON; only for files that this project writes."""

    def with_entry(entry: str) -> Callable[[bytes], bytes]:
        return lambda content: content.strip()[:-1].rstrip() + f", {entry}}}".encode()

    yield "a number NaN", with_entry('"more": NaN')
    yield "a number Infinity", with_entry('"more": -Infinity')
    yield "a number beyond floats", with_entry('"more": 1e999')
    yield "an integer beyond 64 bits", with_entry(f'"more": {2**70}')
    yield "an integer of 5000 digits", with_entry(f'"more": {"9" * 5000}')
    yield "a surrogate", with_entry('"more": "\\ud800"')
    yield "a surrogate key", with_entry('"\\udfff": 1')
    yield "another key twice", with_entry('"more": 1, "more": 2')


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Replace a file's content."""
    path.write_bytes(change(path.read_bytes()))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object of a JSON file."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def put(path: Path, keys: tuple[str | int, ...], value: object) -> None:
    """Put a value into a JSON file, at a path of keys; "DELETE" takes it out."""

    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        if value == "DELETE":
            del document[keys[-1]]
        else:
            document[keys[-1]] = value

    edit(path, change)
