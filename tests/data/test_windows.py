"""Evaluation windows are consecutive and complete."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from safetensors.torch import save_file

import neuronal_ray.data.windows
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.windows import evaluation_name, evaluation_windows

VOCABULARY = 256
BUILTIN = Path(neuronal_ray.data.windows.__file__).parent / "builtin" / "evaluation.txt"
ROWS = ["first row", "", "third row \u00e4"]


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def windows_of(text: str, length: int) -> list[list[int]]:
    """Consecutive windows of the tokens, the remainder dropped."""
    tokens = encode(text)
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def evaluate(
    source: str, length: int = 4, *, vocabulary: int = VOCABULARY, encoder: Callable[[str], list[int]] = encode
) -> torch.Tensor:
    return evaluation_windows(source, encoder, sequence_length=length, vocabulary=vocabulary)


def message_of(function: Callable[[], object], *expected: str) -> None:
    with pytest.raises(BadInput, match="--evaluate") as caught:
        function()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in ("--evaluate", *expected):
        assert part in message, message


def write_tokens(path: Path, tokens: torch.Tensor) -> str:
    save_file({"input_ids": tokens}, path)
    return str(path)


# Text


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1), length=st.integers(1, 9))
def test_a_text_is_tokenized_once_and_divided_into_windows(tmp_path: Path, text: str, length: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    calls: list[str] = []

    def counting(given_text: str) -> list[int]:
        calls.append(given_text)
        return encode(given_text)

    expected = windows_of(text, length)
    if not expected:
        message_of(lambda: evaluate(str(path), length))
        return
    windows = evaluate(str(path), length, encoder=counting)
    assert calls == [text]
    assert windows.dtype == torch.int64
    assert windows.shape == (len(encode(text)) // length, length)
    assert windows.tolist() == expected


def test_rows_are_joined_by_two_newlines(tmp_path: Path) -> None:
    rows, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    parquet.write_table(pyarrow.table({"text": ROWS}), table)
    expected = windows_of("first row\n\n\n\nthird row \u00e4", 4)
    assert evaluate(str(rows)).tolist() == expected
    assert evaluate(str(table)).tolist() == expected


def test_builtin_is_the_package_s_evaluation_text() -> None:
    text = BUILTIN.read_bytes().decode("utf-8")
    assert evaluate("builtin", 128).tolist() == windows_of(text, 128)


# The hub


@pytest.mark.parametrize(("source", "column", "separator"), [("wikitext2", "text", "\n\n"), ("ptb", "sentence", " ")])
def test_hub_test_splits_are_joined_and_divided_into_windows(
    monkeypatch: pytest.MonkeyPatch, source: str, column: str, separator: str
) -> None:
    def load_dataset(*arguments: object, split: str, **keywords: object) -> datasets.Dataset:
        assert split == "test"
        return datasets.Dataset.from_dict({column: ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert evaluate(source).tolist() == windows_of(separator.join(ROWS), 4)


@pytest.mark.parametrize(
    ("rows", "width", "num_windows"),
    [
        pytest.param(2000, 3, 256, id="more documents and more tokens than are used"),
        pytest.param(2000, 0, 219, id="1100 documents hold fewer than 256 windows"),
        pytest.param(10, 3, 9, id="a small split"),
    ],
)
def test_c4_is_1100_documents_and_at_most_256_windows(
    monkeypatch: pytest.MonkeyPatch, rows: int, width: int, num_windows: int
) -> None:
    documents = [chr(97 + index % 26) * width for index in range(rows)]

    def load_dataset(*arguments: object, split: str, **keywords: object) -> datasets.Dataset:
        assert split == "validation"
        return datasets.Dataset.from_dict({"text": documents})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    length = 4 if width else 5
    first_tokens = encode(" ".join(documents[:1100]))[: 256 * length]
    windows = evaluate("c4", length)
    assert windows.shape == (num_windows, length)
    assert windows.flatten().tolist() == first_tokens[: num_windows * length]


# Refusals


def test_less_than_a_window_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("seven..")
    message_of(lambda: evaluate(str(path), 8), repr(str(path)), "7 tokens", "--sequence-length 8")
    assert evaluate(str(path), 7).tolist() == [encode("seven..")]


def test_empty_sources_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).touch()
        message_of(lambda source=str(tmp_path / name): evaluate(source), "0 tokens")  # type: ignore[misc]


@pytest.mark.parametrize("bad", [-1, 100, 5000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x")
    message_of(lambda: evaluate(str(path), vocabulary=100, encoder=lambda _: [99, 0, 1, bad]), f"id {bad} ", "size 100")
    # An id in the dropped remainder is not used.
    assert evaluate(str(path), vocabulary=100, encoder=lambda _: [99, 0, 1, 2, bad]).shape == (1, 4)


def test_an_unknown_source_names_the_flag() -> None:
    message_of(lambda: evaluate("pile"), "'pile'", "wikitext2", ".safetensors")
    message_of(lambda: evaluate("absent.jsonl"), "'absent.jsonl'", "does not exist")


# Tokens as they are


def test_token_rows_are_the_windows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = torch.arange(40).view(10, 4)
    source = write_tokens(tmp_path / "a.safetensors", tokens)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(evaluate(source, 4), tokens)
    assert caplog.messages == []


def test_the_length_of_token_rows_takes_precedence_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = torch.arange(40).view(4, 10)
    source = write_tokens(tmp_path / "a.safetensors", tokens)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(evaluate(source, 4), tokens)
    assert len(caplog.messages) == 1
    assert "10 tokens" in caplog.messages[0], caplog.messages
    assert "--sequence-length 4" in caplog.messages[0], caplog.messages


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (3, 1)])
def test_token_rows_without_a_prediction_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    source = write_tokens(tmp_path / "a.safetensors", torch.zeros(shape, dtype=torch.int64))
    message_of(lambda: evaluate(source), repr(source), f"{shape[0]} rows of {shape[1]} tokens")


def test_bad_token_files_name_the_flag(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"no header")
    message_of(lambda: evaluate(str(path)), "not a safetensors file")
    source = write_tokens(tmp_path / "float.safetensors", torch.zeros(2, 4))
    message_of(lambda: evaluate(source), "input_ids", "int64")
    source = write_tokens(tmp_path / "large.safetensors", torch.full((2, 4), 256))
    message_of(lambda: evaluate(source), "id 256 ", "size 256")


def test_rows_with_padding_are_refused(tmp_path: Path) -> None:
    ids = torch.ones(2, 4, dtype=torch.int64)
    path = tmp_path / "rows.safetensors"
    save_file({"input_ids": ids, "attention_mask": ids.clone()}, path)
    assert torch.equal(evaluate(str(path)), ids)
    save_file({"input_ids": ids, "attention_mask": ids.tril().contiguous()}, path)
    message_of(lambda: evaluate(str(path)), "attention_mask", "leaves out 5 tokens")


# Names


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("wikitext2", "wikitext2"),
        ("c4", "c4"),
        ("ptb", "ptb"),
        ("builtin", "builtin"),
        ("some/where/held-out.safetensors", "held-out"),
        ("text.v2.jsonl", "text.v2"),
        ("a.txt", "a"),
        ("b.parquet", "b"),
        ("arc_easy", "arc_easy"),
    ],
)
def test_a_file_is_named_by_its_stem(source: str, name: str) -> None:
    assert evaluation_name(source) == name
