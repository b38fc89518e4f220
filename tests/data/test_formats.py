"""Are the files that people have read, whatever their format, and is the column with the text found or asked for?"""

import bz2
import gzip
import json
import logging
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import csv, ipc, parquet

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data import text
from neuronal_ray.data.documents import Conversation
from neuronal_ray.data.encoder import ChatError
from neuronal_ray.data.text import warn_of_unused_columns

FLAG = "--calibration"
ROWS = ["first", "", 'third: \u00e4 "quoted", and\na line']
CHATS: list[Conversation] = [
    [{"role": "user", "content": "who ran?"}, {"role": "assistant", "content": "a dog"}],
    [{"role": "user", "content": "why?"}],
]
WRITTEN = ["<user>who ran?<assistant>a dog", "<user>why?"]


class Tokenizer:
    def __call__(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def end_of_document(self) -> list[int]:
        return []

    def chat_text(self, conversation: Conversation) -> str:
        if conversation[0]["role"] == "nobody":
            raise ChatError("the tokenizer has no\nchat template")
        return "".join(f"<{message['role']}>{message['content']}" for message in conversation)


def read(path: Path | str, *columns: str) -> list[str]:
    documents = text.calibration_documents(str(path), Tokenizer(), flag=FLAG, columns=columns)
    evaluated = text.evaluation_text(str(path), Tokenizer(), flag=FLAG, columns=columns)
    rows = [documents.read(index) for index in range(documents.count)]
    if not documents.continuous and "splits" not in str(path):
        assert evaluated.text == documents.separator.join(rows)
    return rows


def refusal(path: Path | str, *columns: str) -> str:
    with pytest.raises(BadInput, match=FLAG) as refused:
        read(path, *columns)
    assert len(str(refused.value).splitlines()) == 1, refused.value
    return str(refused.value)


def table(**columns: Any) -> pyarrow.Table:
    return pyarrow.table(columns or {"text": ROWS})


def _lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))


def _stream(path: Path) -> None:
    with ipc.new_stream(path, table().schema) as writer:
        writer.write_table(table())


def _file(path: Path) -> None:
    with ipc.new_file(path, table().schema) as writer:
        writer.write_table(table())


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": _lines,
    "lines.json": _lines,
    "list.json": lambda path: path.write_text(json.dumps([{"text": row} for row in ROWS], indent=1)),
    "a.parquet": lambda path: parquet.write_table(table(), path),
    "dictionary.parquet": lambda path: parquet.write_table(table(text=pyarrow.array(ROWS).dictionary_encode()), path),
    "file.arrow": _file,
    "stream.arrow": _stream,
    "a.csv": lambda path: csv.write_csv(table(), path),
    "DATA.JSONL": _lines,
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_its_rows_compressed_or_not(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    FORMATS[name](path)
    assert read(path) == ROWS
    for suffix, compress in COMPRESSIONS.items():
        packed = tmp_path / f"{name}{suffix}"
        packed.write_bytes(compress(path.read_bytes()))
        assert read(packed) == ROWS, suffix
        packed.write_bytes(compress(path.read_bytes())[:-7])
        assert f"not a whole {suffix} file" in refusal(packed)


def test_a_compressed_text_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\r\ntext"))
    assert read(tmp_path / "a.txt.gz") == ["one\r\ntext"]


def test_the_only_column_of_strings_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parquet.write_table(table(id=[1, 2, 3], sentence=ROWS), tmp_path / "a.parquet")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "a.parquet") == ROWS
    assert [record.getMessage() for record in caplog.records] == [
        f"{FLAG}: '{tmp_path}/a.parquet': column 'sentence' is read, ignored: ['id']"
    ]


def test_of_several_columns_one_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(title=["a", "b", "c"], body=ROWS), path)
    assert "['title', 'body']; --text-column chooses one" in refusal(path)
    assert read(path, "body") == read(path, "nope", "body") == ROWS
    assert "none of --text-column nope" in refusal(path, "nope")
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"title": "a", "body": row}) + "\n" for row in ROWS))
    assert "--text-column chooses one" in refusal(lines)
    assert read(lines, "body") == ROWS


def test_columns_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(ROWS)] * 2, names=["text", "text"]), path)
    assert "2 columns 'text'" in refusal(path)
    parquet.write_table(table(text=[1, 2], body=["a", "b"]), path)
    assert "'text' is int64, expected string; --text-column" in refusal(path)
    for kind, raw in ((pyarrow.string(), pyarrow.binary()), (pyarrow.large_string(), pyarrow.large_binary())):
        latin = pyarrow.array([b"caf\xe9"], raw)
        parquet.write_table(table(text=pyarrow.Array.from_buffers(kind, 1, latin.buffers())), path)
        assert "Invalid UTF8" in refusal(path)


def test_a_data_set_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": ROWS * 4})
    rows.save_to_disk(tmp_path / "disk", num_shards=3)
    assert read(tmp_path / "disk") == ROWS * 4
    other = datasets.Dataset.from_dict({"text": ["held out"]})
    datasets.DatasetDict({"train": rows, "validation": other}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "splits") == ROWS * 4
    assert text.evaluation_text(str(tmp_path / "splits"), Tokenizer(), flag=FLAG).text == "held out"
    (tmp_path / "disk" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    assert "expected a name in its directory" in refusal(tmp_path / "disk")


def test_a_directory_of_files_is_read_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    folder.mkdir()
    for name, rows in (("train-00000-of-00002", ROWS), ("train-00001-of-00002", ["more"]), ("test", ["held out"])):
        parquet.write_table(table(text=rows), folder / f"{name}.parquet")
    assert read(folder) == [*ROWS, "more"]
    assert text.evaluation_text(str(folder), Tokenizer(), flag=FLAG).text == "held out"
    (folder / "train.csv").write_text("text\na\n")
    assert "several formats, .csv, .parquet" in refusal(folder)
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"text {number}")
    assert read(texts) == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_chats_go_through_the_chat_template(name: str, tmp_path: Path) -> None:
    def write(rows: list[Conversation]) -> None:
        if name == "a.parquet":
            parquet.write_table(table(messages=rows, prompt=["a"] * len(rows), id=["b"] * len(rows)), tmp_path / name)
        else:
            (tmp_path / name).write_text("".join(json.dumps({"messages": row, "id": "b"}) + "\n" for row in rows))

    write(CHATS)
    assert read(tmp_path / name) == WRITTEN
    write([*CHATS, [{"role": "nobody", "content": "a"}]])
    said = refusal(tmp_path / name)
    assert "row 3 of" in said
    assert "cannot be read as a chat: the tokenizer has no chat template" in said


def test_any_data_set_of_the_hub_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load(*arguments: object) -> datasets.DatasetDict:
        asked.append(arguments)
        parts = {"train": ROWS, "test": ["held out"], "extra": ["more"]}
        return datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": rows}) for name, rows in parts.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = text.calibration_documents("owner/name", Tokenizer(), flag=FLAG)
    assert [documents.read(index) for index in range(documents.count)] == ROWS
    assert text.evaluation_text("owner/name:part", Tokenizer(), flag=FLAG).text == "held out"
    assert text.evaluation_text("owner/name:part:extra", Tokenizer(), flag=FLAG).text == "more"
    assert asked == [("owner/name", None), ("owner/name", "part"), ("owner/name", "part")]
    with pytest.raises(BadInput, match="has the splits train, test, extra, not 'nope'"):
        text.evaluation_text("owner/name::nope", Tokenizer(), flag=FLAG)


def test_a_text_column_without_effect_is_said(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unused_columns(["a.txt", "c4"], ("body",))
    warn_of_unused_columns(["a.txt", "b.jsonl"], ("body",))
    assert ["--text-column: ignored" in record.getMessage() for record in caplog.records] == [True]
