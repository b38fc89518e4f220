"""Texts and token ids that cannot be read: Parquet, Arrow, JSON lines, text, compressed files, rows of benchmarks."""

import gzip
import io
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from bad_inputs.case import Case, Damage, each
from bad_inputs.json_damage import JSON, drawn
from safetensors.torch import save
from tiny import CONTEXT, LENGTH, VOCABULARY, some_text

_CALIBRATED = ("prune", "prune --dry-run", "sweep")
_ROWS = [some_text(number, 60) for number in range(12)]
_LINES = "".join(json.dumps({"text": row}) + "\n" for row in _ROWS).encode()


def cases() -> Iterator[Case]:
    """All of this file."""
    for name, content in _files().items():
        yield from _both(name, content)
    for number, value in enumerate(drawn(JSON, 40, number=11)):
        if not isinstance(value, dict):
            line = json.dumps(value).encode()
            yield from _both("drawn.jsonl", _LINES + line + b"\n", what=f"drawn {number}: {json.dumps(value)[:40]}")
        line = json.dumps({"text": value}).encode() if not isinstance(value, str) else b"3"
        yield from _both("text.jsonl", line, what=f"drawn text {number}")
    for name, content in _good_files().items():
        yield from _both(name, content, harmless=True)
    yield from _tokens()
    yield from _folders()
    yield from _benchmark_rows()


def _both(name: str, content: bytes, *, what: str = "", harmless: bool = False) -> Iterator[Case]:
    """As calibration text of prune and sweep, and as evaluation text of prune and evaluate."""
    file = name.rpartition("/")[2]
    suffix = file[file.index(".") :] if "." in file else ""
    reader = f"text {suffix}"
    shown = what or name.partition(".")[0]
    for commands, flag, option in (
        (_CALIBRATED, "--calibration", "calibration"),
        (("prune", "evaluate"), "--evaluate", "evaluate"),
    ):
        for command in commands:
            damage = partial(_given, content, f"given{suffix}", command, flag, option)
            yield Case(
                reader=reader, what=f"{flag} {shown}", command=command, named=(flag,), damage=damage, harmless=harmless
            )


def _given(content: bytes, name: str, command: str, flag: str, option: str, folder: Path) -> Sequence[str]:
    (folder / name).write_bytes(content)
    return ["--option", f"{option}={folder / name}"] if command == "sweep" else [flag, str(folder / name)]


def _parquet(*columns: pa.Array, names: Sequence[str] = ("text",)) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(list(columns), names=list(names)), buffer)
    return buffer.getvalue()


def _arrow(table: pa.Table, *, stream: bool) -> bytes:
    sink = io.BytesIO()
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _latin(kind: pa.DataType) -> pa.Array:
    """Strings whose bytes are no UTF-8."""
    raw = pa.array([b"caf\xe9 " * 40] * 6, pa.binary() if kind == pa.string() else pa.large_binary())
    return pa.Array.from_buffers(kind, len(raw), raw.buffers())


def _files() -> dict[str, bytes]:
    """Content by name; the name's first part says what is wrong."""
    good = _parquet(pa.array(_ROWS))
    rows = pa.array(_ROWS)
    numbers = pa.array(range(len(_ROWS)))
    found = {
        "empty.txt": b"",
        "blank.txt": b" \n\n\t ",
        "short.txt": b"ten words",
        "latin.txt": b"caf\xe9 " * 200,
        "utf 16.txt": some_text(0, 400).encode("utf-16"),
        "bytes.txt": bytes(range(256)) * 20,
        "cut inside a letter.txt": ("\u00e9" * 400).encode()[:-1],
        "a surrogate.txt": "\ud800".encode("utf-8", "surrogatepass") * 400,
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n \n",
        "cut.jsonl": _LINES[:-20],
        "no json.jsonl": _LINES + b"{]\n",
        "a list.jsonl": _LINES + b"[]\n",
        "another field.jsonl": b'{"content": "a b c"}\n' * 3 + b'{"words": "a"}\n',
        "null.jsonl": _LINES + b'{"text": null}\n',
        "a number.jsonl": _LINES + b'{"text": 3}\n',
        "nested.jsonl": _LINES + b'{"text": {"a": "b"}}\n',
        "text twice.jsonl": _LINES + b'{"text": "a", "text": "b"}\n',
        "too deep.jsonl": _LINES + b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
        "a surrogate.jsonl": _LINES + b'{"text": "\\ud800 word"}\n',
        "latin.jsonl": _LINES + '{"text": "caf\xe9"}\n'.encode("latin-1"),
        "utf 16.jsonl": _LINES.decode().encode("utf-16"),
        "a NUL.jsonl": _LINES + b'{"text": "a\0b"}\n',
        "zeros.jsonl": bytes(500),
        "a lone brace.jsonl": b"{",
        "empty rows.jsonl": b'{"text": ""}\n' * 5,
        "short rows.jsonl": b'{"text": "a"}\n' * 2,
        "an html page.jsonl": b"<html><body>404</body></html>\n",
        "empty.json": b"",
        "a number.json": b"3",
        "cut.json": b'[{"text": "a"',
        "too deep.json": b"[" * 100_000,
        "no rows.json": b"[]",
        "empty.parquet": b"",
        "text.parquet": b"no table",
        "half.parquet": good[: len(good) // 2],
        "without a foot.parquet": good[:-8],
        "damaged inside.parquet": good[:40] + bytes(40) + good[80:],
        "damaged metadata.parquet": good[:-200] + bytes(150) + good[-50:],
        "a pointer.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "two columns text.parquet": _parquet(rows, rows, names=("text", "text")),
        "two text columns.parquet": _parquet(rows, rows, names=("title", "body")),
        "numbers.parquet": _parquet(numbers),
        "no text column.parquet": _parquet(numbers, names=("number",)),
        "lists.parquet": _parquet(pa.array([[row] for row in _ROWS])),
        "structs.parquet": _parquet(pa.array([{"text": row} for row in _ROWS])),
        "dates.parquet": _parquet(pa.array([1, 2], pa.timestamp("s"))),
        "nulls.parquet": _parquet(pa.array([*_ROWS, None])),
        "only nulls.parquet": _parquet(pa.array([None, None])),
        "latin.parquet": _parquet(_latin(pa.string())),
        "large latin.parquet": _parquet(_latin(pa.large_string())),
        "no rows.parquet": _parquet(pa.array([], pa.string())),
        "no columns.parquet": _parquet(names=()),
        "short rows.parquet": _parquet(pa.array(["a", "b"])),
        "empty rows.parquet": _parquet(pa.array(["", ""])),
        "empty.arrow": b"",
        "text.arrow": b"no table",
        "cut.arrow": _arrow(pa.table({"text": rows}), stream=False)[:-200],
        "numbers.arrow": _arrow(pa.table({"text": numbers}), stream=False),
        "empty.csv": b"",
        "latin.csv": b"text\ncaf\xe9\n",
        "no text.csv": b"number\n1\n2\n",
        "empty.json.gz": b"",
        "no gzip.json.gz": _LINES,
        "cut.json.gz": gzip.compress(_LINES)[:-30],
        "no json.json.gz": gzip.compress(b"{]"),
        "empty.jsonl.zst": b"",
        "no zstd.jsonl.zst": _LINES,
        "a file.pdf": b"%PDF-1.4",
        "a file.tar": bytes(10240),
        "a file.docx": b"PK\x03\x04" + bytes(100),
        "a pickle.pkl": b"\x80\x04.",
        "a file.zip": b"PK\x05\x06" + bytes(18),
        "no extension": some_text(0, 400).encode(),
    }
    return found


def _good_files() -> dict[str, bytes]:
    rows = pa.array(_ROWS)
    large = _parquet(rows.cast(pa.large_string()))
    return {
        "lines with blanks.jsonl": b"\n" + _LINES.replace(b"\n", b"\n\n"),
        "carriage returns.jsonl": _LINES.replace(b"\n", b"\r\n"),
        "more fields.jsonl": _LINES.replace(b"{", b'{"url": null, '),
        "more columns.parquet": _parquet(pa.array(range(len(_ROWS))), rows, names=("number", "text")),
        "large strings.parquet": large,
        "the only text column.parquet": _parquet(rows, names=("sentence",)),
    }


def _tokens() -> Iterator[Case]:
    def ids(value: int, *, rows: int = 6, length: int = LENGTH, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full((rows, length), value).to(dtype)

    name, good = "input_ids", ids(5)
    damaged = good.clone()
    damaged[5, 3] = VOCABULARY
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "beyond the vocabulary": {name: ids(VOCABULARY)},
        "one beyond the vocabulary": {name: damaged},
        "negative": {name: ids(-1)},
        "floats": {name: ids(5, dtype=torch.float32)},
        "Booleans": {name: ids(1, dtype=torch.bool)},
        "another name": {"tokens": good},
        "none": {},
        "one row without its dimension": {name: good[0]},
        "three dimensions": {name: good[None]},
        "no rows": {name: good[:0]},
        "no columns": {name: good[:, :0]},
        "a number": {name: torch.tensor(3)},
        "a mask of another shape": {name: good, "attention_mask": good[:2].clone()},
        "a mask of floats": {name: good, "attention_mask": torch.full((6, LENGTH), 0.5)},
        "a mask of zeros": {name: good, "attention_mask": torch.zeros_like(good)},
    }
    for what, given in tensors.items():
        for commands, flag in ((("prune", "prune --dry-run"), "--calibration"), (("prune", "evaluate"), "--evaluate")):
            if what == "one beyond the vocabulary" and flag == "--calibration":
                continue  # the first four rows are used
            yield from each(
                commands, reader="tokens", what=f"{flag} {what}", named=(flag,),
                damage=partial(_given, save(given), "given.safetensors", "prune", flag, ""),
            )  # fmt: skip
    for what, length, rows in (("narrow", LENGTH - 1, 6), ("wide", CONTEXT + 1, 6), ("few", LENGTH, 3)):
        content = save({name: ids(5, rows=rows, length=length)})
        damage = partial(_given, content, "given.safetensors", "prune", "--calibration", "")
        yield from each(
            ("prune", "prune --dry-run"), reader="tokens", what=what, named=("--calibration",), damage=damage
        )
    yield from each(
        ("prune", "evaluate"), reader="tokens", what="longer than the context", named=("--evaluate",),
        damage=partial(_given, save({name: ids(5, length=CONTEXT + 1)}), "x.safetensors", "prune", "--evaluate", ""),
    )  # fmt: skip
    for what, rewrite in (
        ("cut", lambda content: content[:-9]),
        ("nothing", lambda _: b""),
        ("text", lambda _: b"x" * 90),
    ):
        for flag in ("--calibration", "--evaluate"):
            damage = partial(_given, rewrite(save({name: good})), "given.safetensors", "prune", flag, "")  # type: ignore[no-untyped-call]
            yield from each(("prune",), reader="tokens", what=f"{flag} {what}", named=(flag,), damage=damage)
    whole: Damage = partial(_given, save({name: good}), "given.safetensors", "prune", "--calibration", "")
    yield from each(("prune",), reader="tokens", what="good", named=(), damage=whole, harmless=True)


def _folders() -> Iterator[Case]:
    """Directories in place of files."""

    def made(write: Callable[[Path], object], flag: str, folder: Path) -> Sequence[str]:
        (folder / "given").mkdir()
        write(folder / "given")
        return [flag, str(folder / "given")]

    writers: dict[str, Callable[[Path], object]] = {
        "empty": lambda _: None,
        "other files": lambda path: (path / "a.txt").write_text("a"),
        "an index without data": lambda path: (path / "dataset_info.json").write_text("{}"),
        "a broken index": lambda path: (path / "state.json").write_text("{]"),
        "an index of nothing": lambda path: [
            (path / "state.json").write_text('{"_data_files": [{"filename": "x.arrow"}]}'),
            (path / "dataset_info.json").write_text("{}"),
        ],
        "splits that are not there": lambda path: (path / "dataset_dict.json").write_text('{"splits": ["train"]}'),
        "broken splits": lambda path: (path / "dataset_dict.json").write_text("[]"),
    }
    for what, write in writers.items():
        for commands, flag in ((("prune", "prune --dry-run"), "--calibration"), (("prune", "evaluate"), "--evaluate")):
            yield from each(
                commands, reader="text folder", what=f"{flag} {what}", named=(flag,), damage=partial(made, write, flag)
            )


def _benchmark_rows() -> Iterator[Case]:
    """Rows of RTE under --task-data."""
    good = {"premise": "a cat sat", "hypothesis": "it sat", "label": "entailment"}
    line = json.dumps(good).encode() + b"\n"
    contents = {
        "empty": b"", "blank": b"\n \n", "no json": line + b"{]\n", "a list": line + b"[]\n", "a number": b"3\n",
        "no label": b'{"premise": "a", "hypothesis": "b"}\n', "another label": line.replace(b"entailment", b"maybe"),
        "a label that is null": line.replace(b'"entailment"', b"null"), "latin": line.replace(b"cat", b"caf\xe9"),
        "too deep": line + b"[" * 100_000 + b"\n", "a surrogate": line.replace(b"cat", b"\\ud800"),
        "a label of 7": line.replace(b'"entailment"', b"7"), "cut": line[:-9],
        "premise null": line.replace(b'"a cat sat"', b"null"),
        "premise a number": line.replace(b'"a cat sat"', b"3"),
        "premise twice": line.replace(b"{", b'{"premise": "x", ', 1),
        "types that differ": line + line.replace(b'"it sat"', b'["x"]'),
    }  # fmt: skip
    for what, content in contents.items():

        def damage(folder: Path, content: bytes = content) -> Sequence[str]:
            (folder / "tasks").mkdir()
            (folder / "tasks" / "rte_val.jsonl").write_bytes(content)
            return ["--task-data", str(folder / "tasks"), "--evaluate", "rte"]

        yield from each(
            ("evaluate", "prune --dry-run"), reader="benchmark rows", what=what, named=("--task-data",), damage=damage,
            either=what.startswith("premise "),
        )  # fmt: skip
