"""Each source has its text, and unusable sources are refused."""

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

import neuronal_ray.data.text
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data import text
from neuronal_ray.data.documents import Conversation, Documents
from neuronal_ray.data.encoder import ChatError
from neuronal_ray.data.text import HUB, NAMES, EvaluationText, check_source, is_file_name, is_tokenized

BUILTIN = Path(neuronal_ray.data.text.__file__).parent / "builtin"
FLAG = "--some-flag"
ROWS = ["first", "", "third: \u00e4\u4e2d\U0001f600\u2028 and a \n break"]


class Tokenizer:
    """Writes each message of a chat as its role and content."""

    def __call__(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def end_of_document(self) -> list[int]:
        return []

    def chat_text(self, conversation: Conversation) -> str:
        if conversation[0]["role"] == "nobody":
            raise ChatError("roles must\nalternate")
        return "".join(f"<{message['role']}>{message['content']}" for message in conversation)


def calibration_documents(source: str, *, flag: str, columns: tuple[str, ...] = ()) -> Documents:
    return text.calibration_documents(source, Tokenizer(), flag=flag, columns=columns)


def evaluation_text(source: str, *, flag: str, columns: tuple[str, ...] = ()) -> EvaluationText:
    return text.evaluation_text(source, Tokenizer(), flag=flag, columns=columns)


def read_all(documents: Documents) -> list[str]:
    return [documents.read(index) for index in range(documents.count)]


def message_of(function: Callable[[], object]) -> str:
    with pytest.raises(BadInput, match=FLAG) as caught:
        function()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert FLAG in message, message
    return message


def write_jsonl(path: Path, rows: list[str]) -> str:
    path.write_text("".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, rows: list[str | None], kind: pyarrow.DataType | None = None) -> str:
    table = pyarrow.table({"id": list(range(len(rows))), "text": pyarrow.array(rows, kind or pyarrow.string())})
    parquet.write_table(table, path, row_group_size=2)
    return str(path)


def test_importing_is_light() -> None:
    code = (
        "import sys, neuronal_ray.data, neuronal_ray.data.text\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'safetensors', 'transformers', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import neuronal_ray.data.calibration, neuronal_ray.data.windows\n"
        "heavy = {'datasets', 'pyarrow', 'transformers', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(neuronal_ray.data.text.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Which sources there are


@pytest.mark.parametrize("name", ["c4", "wikitext2", "ptb", "builtin"])
def test_names_are_known(name: str) -> None:
    check_source(name, flag=FLAG)
    assert name in NAMES
    assert not is_file_name(name)
    assert not is_tokenized(name)


@pytest.mark.parametrize("source", ["c5", "C4", "", "text.pdf", "text.gz", "folder/", ".txt", "a\nb"])
def test_an_unknown_source_is_refused_with_the_list(source: str) -> None:
    message = message_of(lambda: check_source(source, flag=FLAG))
    for expected in [repr(source), *NAMES, ".txt", ".jsonl", ".parquet", ".safetensors"]:
        assert expected in message, message


@pytest.mark.parametrize("extension", [".txt", ".jsonl", ".parquet", ".safetensors"])
def test_a_missing_file_is_refused(tmp_path: Path, extension: str) -> None:
    source = str(tmp_path / f"absent{extension}")
    message = message_of(lambda: check_source(source, flag=FLAG))
    assert repr(source) in message, message
    assert "does not exist" in message, message


@pytest.mark.parametrize("read", [calibration_documents, evaluation_text])
@pytest.mark.parametrize("source", ["nothing", "absent.txt", "absent.jsonl", "absent.parquet"])
def test_both_uses_check_the_source(read: Callable[..., object], source: str) -> None:
    assert repr(source) in message_of(lambda: read(source, flag=FLAG))


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    assert "is a directory" in message_of(lambda: calibration_documents(str(tmp_path / "folder.txt"), flag=FLAG))


def test_the_extension_tells_tokens_from_text() -> None:
    assert is_tokenized("a/b.safetensors")
    assert is_file_name("a/b.safetensors")
    assert not is_tokenized("a/b.jsonl")
    assert is_file_name("a/b.jsonl")


# Text files


def test_a_text_file_is_one_document_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    text = "one\r\ntwo\rthree\n\n \u00e4\u2028\n"
    path.write_bytes(text.encode())
    documents = calibration_documents(str(path), flag=FLAG)
    assert documents.continuous
    assert read_all(documents) == [text]
    assert evaluation_text(str(path), flag=FLAG).text == text


@pytest.mark.parametrize("read", [calibration_documents, evaluation_text])
def test_a_text_file_in_another_encoding_is_refused(tmp_path: Path, read: Callable[..., object]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\u00e4".encode("latin-1"))
    message = message_of(lambda: read(str(path), flag=FLAG))
    assert repr(str(path)) in message, message
    assert "UTF-8" in message, message


@pytest.mark.parametrize("name", ["calibration.txt", "evaluation.txt"])
def test_builtin_is_the_package_s_own_text(name: str) -> None:
    path = BUILTIN / name
    text = path.read_bytes().decode("utf-8")
    if name == "calibration.txt":
        documents = calibration_documents("builtin", flag=FLAG)
        assert documents.continuous
        assert read_all(documents) == [text]
    else:
        assert evaluation_text("builtin", flag=FLAG).text == text
        assert evaluation_text("builtin", flag=FLAG).windows is None


# Rows


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ROWS)
    documents = calibration_documents(source, flag=FLAG)
    assert not documents.continuous
    assert read_all(documents) == ROWS
    assert documents.read(2) == ROWS[2]
    assert documents.read(0) == ROWS[0]
    assert evaluation_text(source, flag=FLAG).text == "\n\n".join(ROWS)
    assert evaluation_text(source, flag=FLAG).windows is None


def test_jsonl_may_have_raw_unicode_blank_lines_other_line_ends_and_no_last_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "\u00e4\u2028\u0085"}\r\n\n  \n{"x": {}, "text": "b"}'.encode())
    assert read_all(calibration_documents(str(path), flag=FLAG)) == ["\u00e4\u2028\u0085", "b"]
    assert evaluation_text(str(path), flag=FLAG).text == "\u00e4\u2028\u0085\n\nb"


@pytest.mark.parametrize("read", [calibration_documents, evaluation_text])
@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "beyond 64 bits"),
        (b'{"text": "a", "text": "b"}', "twice"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"content": "a", "n\\new": 1}', "['content', 'n\\new']"),
        (b'["text"]', "list"),
        (b"3", "int"),
        (b'{"text": null}', "NoneType"),
        (b'{"text": 3}', "int"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, read: Callable[..., object], line: bytes, found: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    message = message_of(lambda: read(str(path), flag=FLAG))
    for expected in [repr(str(path)), "line 3", found, "'text'"]:
        assert expected in message, message


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_parquet_rows_are_documents(tmp_path: Path, kind: pyarrow.DataType) -> None:
    source = write_parquet(tmp_path / "a.parquet", [*ROWS, "fourth"], kind)
    documents = calibration_documents(source, flag=FLAG)
    assert not documents.continuous
    assert read_all(documents) == [*ROWS, "fourth"]
    assert evaluation_text(source, flag=FLAG).text == "\n\n".join([*ROWS, "fourth"])
    assert evaluation_text(source, flag=FLAG).windows is None


@pytest.mark.parametrize("read", [calibration_documents, evaluation_text])
class TestBadParquet:
    def test_no_text_column(self, tmp_path: Path, read: Callable[..., object]) -> None:
        source = str(tmp_path / "a.parquet")
        parquet.write_table(pyarrow.table({"content": [1.5], "n\new": [1]}), source)
        message = message_of(lambda: read(source, flag=FLAG))
        assert repr(source) in message, message
        assert "['content', 'n\\new']" in message, message
        assert "'text'" in message, message

    def test_text_that_is_no_text(self, tmp_path: Path, read: Callable[..., object]) -> None:
        source = str(tmp_path / "a.parquet")
        parquet.write_table(pyarrow.table({"text": [1, 2]}), source)
        message = message_of(lambda: read(source, flag=FLAG))
        assert "int64" in message, message
        assert "string" in message, message

    def test_nested_text(self, tmp_path: Path, read: Callable[..., object]) -> None:
        source = str(tmp_path / "a.parquet")
        parquet.write_table(pyarrow.table({"text": [{"a": "x"}]}), source)
        assert "struct" in message_of(lambda: read(source, flag=FLAG))

    def test_a_row_without_text(self, tmp_path: Path, read: Callable[..., object]) -> None:
        source = write_parquet(tmp_path / "a.parquet", ["a", "b", "c", None, None])
        assert "row 4" in message_of(lambda: read(source, flag=FLAG))

    def test_truncated(self, tmp_path: Path, read: Callable[..., object]) -> None:
        whole = Path(write_parquet(tmp_path / "whole.parquet", ["a", "b"]))
        path = tmp_path / "a.parquet"
        path.write_bytes(whole.read_bytes()[:-10])
        message = message_of(lambda: read(str(path), flag=FLAG))
        assert repr(str(path)) in message, message
        assert "not a Parquet file" in message, message

    def test_empty_file(self, tmp_path: Path, read: Callable[..., object]) -> None:
        path = tmp_path / "a.parquet"
        path.touch()
        assert "not a Parquet file" in message_of(lambda: read(str(path), flag=FLAG))


# The hub: load_dataset is replaced, the data sets it gives are real


class FakeHub:
    """Returns rows as the hub's three data sets would, and records the requests."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[object, ...], dict[str, object]]] = []

    def load_dataset(self, *arguments: object, **keywords: object) -> datasets.Dataset:
        self.calls.append((arguments, keywords))
        repository, split = arguments[0], keywords["split"]
        if repository == "ptb-text-only/ptb_text_only":
            return datasets.Dataset.from_dict({"sentence": [f"{split} a", f"{split} b"]})
        rows = [f"{split} {index}" for index in range(1200)] if repository == "allenai/c4" else ["", " = A = \n"]
        return datasets.Dataset.from_dict({"text": rows, "other": list(range(len(rows)))})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(datasets, "load_dataset", fake.load_dataset)
    return fake


def test_c4_is_calibrated_on_the_first_training_shard_document_by_document(hub: FakeHub) -> None:
    documents = calibration_documents("c4", flag=FLAG)
    assert hub.calls == [
        (
            ("allenai/c4", None),
            {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train", "revision": None},
        )
    ]
    assert not documents.continuous
    assert documents.count == 1200
    assert documents.read(7) == "train 7"


def test_c4_is_evaluated_on_the_first_1100_validation_documents(hub: FakeHub) -> None:
    evaluation = evaluation_text("c4", flag=FLAG)
    assert hub.calls == [
        (
            ("allenai/c4", None),
            {
                "data_files": {"validation": "en/c4-validation.00000-of-00008.json.gz"},
                "split": "validation",
                "revision": None,
            },
        )
    ]
    assert evaluation.text == " ".join(f"validation {index}" for index in range(1100))
    assert evaluation.windows == 256


def test_wikitext2_is_raw_with_blanks_for_calibration_and_two_newlines_for_evaluation(hub: FakeHub) -> None:
    documents = calibration_documents("wikitext2", flag=FLAG)
    evaluation = evaluation_text("wikitext2", flag=FLAG)
    assert [arguments for arguments, _ in hub.calls] == [("Salesforce/wikitext", "wikitext-2-raw-v1")] * 2
    assert [keywords for _, keywords in hub.calls] == [
        {"data_files": None, "split": split, "revision": None} for split in ("train", "test")
    ]
    assert documents.continuous
    assert read_all(documents) == ["  = A = \n"]
    assert evaluation.text == "\n\n = A = \n"
    assert evaluation.windows is None


def test_ptb_comes_without_a_script_and_is_joined_with_blanks(hub: FakeHub) -> None:
    documents = calibration_documents("ptb", flag=FLAG)
    evaluation = evaluation_text("ptb", flag=FLAG)
    assert [arguments for arguments, _ in hub.calls] == [("ptb-text-only/ptb_text_only", None)] * 2
    assert [keywords for _, keywords in hub.calls] == [
        {"data_files": None, "split": split, "revision": "refs/convert/parquet"} for split in ("train", "test")
    ]
    assert documents.continuous
    assert read_all(documents) == ["train a train b"]
    assert evaluation.text == "test a test b"
    assert evaluation.windows is None


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it\non the Hub"),
        TimeoutError("timed out"),
        datasets.exceptions.DatasetNotFoundError("gone"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
        ValueError("Couldn't find cache for it\nAvailable configs in the cache: ['x']"),
    ],
)
@pytest.mark.parametrize("read", [calibration_documents, evaluation_text])
@pytest.mark.parametrize("source", sorted(HUB))
def test_a_hub_that_does_not_answer_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, read: Callable[..., object], source: str, error: Exception
) -> None:
    def fail(*arguments: object, **keywords: object) -> datasets.Dataset:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = message_of(lambda: read(source, flag=FLAG))
    for expected in [repr(source), "could not be reached", "local file", ".jsonl", str(error).split()[0]]:
        assert expected in message, message


def test_the_real_load_dataset_takes_these_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given: copies of the repositories' layouts, which datasets prefers to the hub.
    shards = {"train": "c4-train.00000-of-01024", "validation": "c4-validation.00000-of-00008"}
    (tmp_path / "allenai/c4/en").mkdir(parents=True)
    for name in [*shards.values(), "c4-train.00001-of-01024"]:
        with gzip.open(tmp_path / f"allenai/c4/en/{name}.json.gz", "wt") as file:
            file.writelines(json.dumps({"text": f"{name} {index}", "url": ""}) + "\n" for index in range(2))
    for split in ("train", "validation", "test"):
        folder = tmp_path / "ptb-text-only/ptb_text_only/penn_treebank" / split
        folder.mkdir(parents=True)
        parquet.write_table(pyarrow.table({"sentence": [f"{split} a", f"{split} b"]}), folder / "0000.parquet")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache/downloads"))
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "cache/extracted"))
    # When and then: the shard that was asked for and no other, and PTB's splits by their folders.
    assert read_all(calibration_documents("c4", flag=FLAG)) == [f"{shards['train']} {i}" for i in range(2)]
    assert evaluation_text("c4", flag=FLAG).text == " ".join(f"{shards['validation']} {i}" for i in range(2))
    assert read_all(calibration_documents("ptb", flag=FLAG)) == ["train a train b"]
    assert evaluation_text("ptb", flag=FLAG).text == "test a test b"
