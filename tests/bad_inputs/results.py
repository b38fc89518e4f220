"""Results and journals that are damaged, edited by hand, or of another version: JSON, Parquet, JSON lines."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from bad_inputs.case import Case, each
from bad_inputs.json_damage import edit, put, rewrite, strict_damages, text_damages, wrong_types

_FILES: dict[str, tuple[str, str | None]] = {
    "run/pruning.json": ("report RUN", "model"),
    "study/sweep.json": ("report STUDY", "title"),
    "search.json": ("benchmark table", "measured"),
}
_KINDS: dict[str, dict[tuple[str | int, ...], type | tuple[type, ...]]] = {
    "run/pruning.json": {
        ("format",): int, ("model",): str, ("method",): str, ("allocation",): str, ("mode",): str, ("sparsity",): dict,
        ("sparsity", "target"): (float, int), ("sparsity", "achieved"): (float, int), ("sparsity", "pruned"): int,
        ("search",): dict, ("search", "block"): dict, ("search", "block", "selected"): (float, int),
        ("evaluation",): dict, ("evaluation", "evaluation"): dict, ("evaluation", "evaluation", "dense"): dict,
        ("evaluation", "evaluation", "windows"): int, ("seconds",): dict, ("seconds", "ranking"): (float, int),
        ("calibration",): dict, ("versions",): dict, ("devices",): list, ("config",): dict,
    },
    "study/sweep.json": {("title",): str, ("cells",): dict, ("reproduces",): list, ("compare",): list},
    "search.json": {
        ("machine",): dict, ("measured",): list, ("machine", "versions"): dict, ("machine", "cores"): int,
        ("machine", "host_bytes"): int, ("measured", 0): dict, ("measured", 0, "search_s"): (float, int),
        ("measured", 0, "stages"): list, ("measured", 0, "literal"): (dict, type(None)), ("measured", 0, "blocks"): int,
    },
}  # fmt: skip
_TABLES = {
    "run/search.parquet": ("report RUN", ("step", "lambda", "criterion", "score", "selected", "seconds")),
    "run/allocation.parquet": ("report RUN", ("block", "path", "rows", "columns", "pruned", "row_pruned")),
    "study/results": ("report STUDY", ("cell", "variant", "model", "sparsity", "value", "metric", "rows", "config")),
}
_JOURNAL = "study/journal.jsonl"


def cases() -> Iterator[Case]:
    """All of this file."""
    for file, (command, key) in _FILES.items():
        name = Path(file).name
        for what, change in (*text_damages(key=key), *strict_damages()):
            damage = partial(_rewritten, file, change)
            yield from each((command,), reader=name, what=what, named=(name,), damage=damage)
        for number, (keys, kind) in enumerate(_KINDS[file].items()):
            place = ".".join(map(str, keys))
            for value in ("DELETE", *wrong_types(kind, 10, number=number)):
                if value == "DELETE" and (
                    keys[-1] == 0 or place.endswith(("ranking", "block", "evaluation.evaluation"))
                ):
                    continue  # one entry fewer of a list or of free names is a good file
                damage = partial(_put, file, keys, value)
                yield from each(
                    (command,), reader=name, what=f"{place} {json.dumps(value)[:40]}", named=(name,), damage=damage
                )
    for file, (command, columns) in _TABLES.items():
        yield from _tables(file, command, columns)
    yield from _journals()
    yield from _names()
    yield Case(
        reader="pruning.json", what="an unknown key", command="report RUN", named=(), harmless=True,
        damage=partial(_put, "run/pruning.json", ("comment",), "by hand"),
    )  # fmt: skip


def _rewritten(file: str, change: Callable[[bytes], bytes], folder: Path) -> Sequence[str]:
    rewrite(folder / file, change)
    return []


def _put(file: str, keys: tuple[str | int, ...], value: object, folder: Path) -> Sequence[str]:
    put(folder / file, keys, value)
    return []


def _one_file(folder: Path, file: str) -> Path:
    path = folder / file
    return sorted(path.glob("*.parquet"))[0] if path.is_dir() else path


def _tables(file: str, command: str, columns: Sequence[str]) -> Iterator[Case]:
    def table(change: Callable[[pa.Table], pa.Table], folder: Path) -> Sequence[str]:
        path = _one_file(folder, file)
        pq.write_table(change(pq.read_table(path)), path)
        return []

    def raw(change: Callable[[bytes], bytes], folder: Path) -> Sequence[str]:
        rewrite(_one_file(folder, file), change)
        return []

    def with_column(name: str, make: Callable[[pa.Table], pa.Array]) -> Callable[[pa.Table], pa.Table]:
        return lambda rows: rows.set_column(rows.column_names.index(name), name, make(rows))

    named = (".parquet",)
    reader = Path(file).name if file.endswith(".parquet") else "results/*.parquet"
    contents: dict[str, Callable[[bytes], bytes]] = {
        "nothing": lambda _: b"", "text": lambda _: b"no table", "half": lambda content: content[: len(content) // 2],
        "zeros": lambda content: bytes(len(content)), "without a foot": lambda content: content[:-8],
        "damaged inside": lambda content: content[:30] + bytes(60) + content[90:],
        "damaged metadata": lambda content: content[:-200] + bytes(150) + content[-50:],
    }  # fmt: skip
    for what, change in contents.items():
        yield from each((command,), reader=reader, what=what, named=named, damage=partial(raw, change))
    changes: dict[str, Callable[[pa.Table], pa.Table]] = {"no columns": lambda rows: rows.select([])}
    for name in columns:
        changes[f"no {name}"] = lambda rows, name=name: rows.drop_columns([name])  # type: ignore[misc]
        changes[f"{name} of dates"] = with_column(name, lambda rows: pa.array([0] * len(rows), pa.timestamp("s")))
        changes[f"{name} of structs"] = with_column(name, lambda rows: pa.array([{"a": "b"}] * len(rows)))
        changes[f"{name} another name"] = lambda rows, name=name: rows.rename_columns(  # type: ignore[misc]
            [f"{other}s" if other == name else other for other in rows.column_names]
        )
        if name != "value":
            changes[f"{name} null"] = with_column(
                name,
                lambda rows, name=name: pa.array([None] * len(rows), rows.schema.field(name).type),  # type: ignore[misc]
            )
    if "allocation" in file:
        changes["no rows"] = lambda rows: rows.slice(0, 0)
        changes["pruned off by one"] = with_column("pruned", lambda rows: pc.add(rows["pruned"], 1))
        changes["negative counts"] = with_column("pruned", lambda rows: pc.negate(pc.add(rows["pruned"], 1)))
        changes["no columns left"] = with_column("columns", lambda rows: pa.array([0] * len(rows), pa.int32()))
        changes["fewer rows"] = with_column("rows", lambda rows: pc.subtract(rows["rows"], 1))
    if "search" in file:
        changes["nothing selected"] = with_column("selected", lambda rows: pa.array([False] * len(rows)))
        changes["no rows"] = lambda rows: rows.slice(0, 0)
    for what, changed in changes.items():
        yield from each((command,), reader=reader, what=what, named=named, damage=partial(table, changed))


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / _JOURNAL).read_text().splitlines() if line]


def _journals() -> Iterator[Case]:
    """Lines of a sweep's journal that are not its last; the last one may be cut short."""

    def inserted(line: bytes, folder: Path) -> Sequence[str]:
        path = folder / _JOURNAL
        rows = [row for row in path.read_bytes().split(b"\n") if row]
        path.write_bytes(b"\n".join([rows[0], line, *rows[1:]]))
        return []

    def changed(event: str, keys: tuple[str, ...], value: object, folder: Path) -> Sequence[str]:
        entries = _lines(folder)
        node: Any = next(entry for entry in entries if entry["event"] == event)
        for key in keys[:-1]:
            node = node[key]
        if value == "DELETE":
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
        (folder / _JOURNAL).write_text("\n" + "\n".join(map(json.dumps, entries)))
        return []

    named = ("journal.jsonl",)
    bad_lines = {
        "no JSON": b"{]", "a list": b"[]", "a number": b"3", "null": b"null", "a word": b"model",
        "half": b'{"event": "res',
        "latin 1": b'{"event": "caf\xe9"}', "NULs": bytes(20), "too deep": b"[" * 100_000,
        "a key twice": b'{"event": "x", "event": "x"}',
        "an unknown event": b'{"event": "nope"}', "no event": b'{"cell": "x"}', "an empty object": b"{}",
        "a surrogate": b'{"event": "\\ud800"}', "NaN": b'{"event": NaN}', "a huge number": b'{"event": 1e999}',
        "a row that is no object": b'{"event": "result", "row": []}', "a plan without a cell": b'{"event": "planned"}',
    }  # fmt: skip
    for what, line in bad_lines.items():
        damage = partial(inserted, line)
        yield from each(("sweep --resume",), reader="journal.jsonl", what=what, named=named, damage=damage)
    places: dict[tuple[str, tuple[str, ...]], type | tuple[type, ...]] = {
        ("result", ("row",)): dict, ("result", ("row", "cell")): str,
        ("result", ("row", "value")): (float, int, type(None)),
        ("result", ("row", "rows")): int, ("result", ("row", "metric")): str,
        ("result", ("row", "sparsity")): (float, int),
        ("planned", ("cell",)): str, ("planned", ("steps",)): list, ("planned", ("seconds",)): (float, int),
        ("planned", ("lower_ties_first",)): bool, ("planned", ("solver_rates",)): list,
    }  # fmt: skip
    for number, ((event, keys), kind) in enumerate(places.items()):
        for value in ("DELETE", *wrong_types(kind, 8, number=number)):
            yield from each(
                ("sweep --resume",), reader="journal.jsonl", what=f"{event} {'.'.join(keys)} {json.dumps(value)[:40]}",
                named=named, damage=partial(changed, event, keys, value),
            )  # fmt: skip
    for cell in ("../outside", "/tmp/outside", "a/b", "..", "", "x" * 300, "a\0b"):
        for event, keys in (("result", ("row", "cell")), ("planned", ("cell",))):
            yield from each(
                ("sweep --resume",), reader="journal.jsonl", what=f"{event} of {cell[:20]!a}", named=named,
                damage=partial(changed, event, keys, cell),
            )  # fmt: skip


def _names() -> Iterator[Case]:
    """Names of cells in sweep.json that become paths."""
    for name in ("../outside", "/tmp/outside", "a/b", "..", "", "x" * 300, "a\0b"):

        def damage(folder: Path, name: str = name) -> Sequence[str]:
            edit(
                folder / "study/sweep.json",
                lambda index: index["cells"].update({name: next(iter(index["cells"].values()))}),
            )
            return []

        yield from each(
            ("report STUDY", "sweep --resume"), reader="sweep.json", what=f"a cell {name[:20]!a}",
            named=("sweep.json", "--output"), damage=damage,
        )  # fmt: skip
