"""Calibration sequences equal the draws of the published data loaders."""

import json
import random
import time
from collections import Counter
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

import neuronal_ray.data.calibration
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.data.calibration import calibration_tokens

VOCABULARY = 256
BUILTIN = Path(neuronal_ray.data.calibration.__file__).parent / "builtin" / "calibration.txt"
RELAXED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


def wanda_document_draw(documents: list[str], samples: int, length: int, seed: int) -> list[list[int]]:
    """Draw as the released code does for C4, from a seeded generator."""
    source = random.Random(seed)
    drawn = []
    for _ in range(samples):
        while True:
            tokens = encode(documents[source.randint(0, len(documents) - 1)])
            if len(tokens) > length:
                break
        start = source.randint(0, len(tokens) - length - 1)
        drawn.append(tokens[start : start + length])
    return drawn


def wanda_running_draw(text: str, samples: int, length: int, seed: int) -> list[list[int]]:
    """Draw as the released code does for WikiText-2: one text, and one start for each sample."""
    source = random.Random(seed)
    tokens = encode(text)
    starts = [source.randint(0, len(tokens) - length - 1) for _ in range(samples)]
    return [tokens[start : start + length] for start in starts]


def draw(
    source: str,
    samples: int = 5,
    length: int = 8,
    seed: int = 0,
    *,
    vocabulary: int = VOCABULARY,
    encoder: Callable[[str], list[int]] = encode,
) -> torch.Tensor:
    return calibration_tokens(
        source, encoder, samples=samples, sequence_length=length, seed=seed, vocabulary=vocabulary
    )


def message_of(function: Callable[[], object], *expected: str) -> None:
    with pytest.raises(BadInput, match="--calibration") as caught:
        function()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    for part in ("--calibration", *expected):
        assert part in message, message


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return str(path)


def write_parquet(path: Path, documents: list[str]) -> str:
    parquet.write_table(pyarrow.table({"text": pyarrow.array(documents, pyarrow.string())}), path)
    return str(path)


def some_documents(seed: int, count: int = 40) -> list[str]:
    source = random.Random(seed)
    return ["".join(source.choices("abcdefgh \u00e4", k=source.randint(0, 30))) for _ in range(count)]


# The draw


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
@pytest.mark.parametrize("seed", [0, 1, 12345, -7])
def test_rows_are_drawn_as_wanda_draws_c4(tmp_path: Path, write: Callable[..., str], seed: int) -> None:
    documents = some_documents(seed)
    source = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", documents)
    tokens = draw(source, samples=50, length=11, seed=seed)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == wanda_document_draw(documents, 50, 11, seed)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_text_file_is_drawn_as_wanda_draws_wikitext2(tmp_path: Path, seed: int) -> None:
    text = "\n".join(some_documents(seed))
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokens = draw(str(tmp_path / "a.txt"), samples=50, length=11, seed=seed)
    assert tokens.tolist() == wanda_running_draw(text, 50, 11, seed)


def test_a_single_row_is_still_drawn_as_a_document(tmp_path: Path) -> None:
    text = "one document, longer than a sequence"
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    assert draw(source, samples=20).tolist() == wanda_document_draw([text], 20, 8, 0)


@pytest.mark.parametrize(
    ("source", "column", "continuous"), [("c4", "text", False), ("wikitext2", "text", True), ("ptb", "sentence", True)]
)
def test_the_hub_s_data_sets_are_drawn_from(
    monkeypatch: pytest.MonkeyPatch, source: str, column: str, continuous: bool
) -> None:
    rows = some_documents(3)

    def load_dataset(*arguments: object, split: str, **keywords: object) -> datasets.Dataset:
        assert split == "train"
        return datasets.Dataset.from_dict({"other": [0] * len(rows), column: rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    expected = wanda_running_draw(" ".join(rows), 20, 8, 5) if continuous else wanda_document_draw(rows, 20, 8, 5)
    assert draw(source, samples=20, seed=5).tolist() == expected


def test_builtin_is_drawn_from() -> None:
    text = BUILTIN.read_bytes().decode("utf-8")
    assert draw("builtin", samples=8, length=128).tolist() == wanda_running_draw(text, 8, 128, 0)


@RELAXED
@given(
    lengths=st.lists(st.integers(0, 25), min_size=1, max_size=12),
    samples=st.integers(1, 12),
    length=st.integers(1, 12),
    seed=st.integers(0, 2**64),
    first=st.integers(1, 12),
)
def test_the_first_samples_of_a_draw_are_a_smaller_draw(
    tmp_path: Path, lengths: list[int], samples: int, length: int, seed: int, first: int
) -> None:
    documents = ["".join(chr(97 + (i + j) % 26) for j in range(n)) for i, n in enumerate([*lengths, 20])]
    rows, text = tmp_path / "a.jsonl", tmp_path / "a.txt"
    write_jsonl(rows, documents)
    text.write_text(" ".join(documents))
    for source in (str(rows), str(text)):
        tokens = draw(source, samples=samples, length=length, seed=seed)
        assert tokens.shape == (samples, length)
        assert torch.equal(tokens, draw(source, samples=samples, length=length, seed=seed))
        few = min(first, samples)
        assert torch.equal(tokens[:few], draw(source, samples=few, length=length, seed=seed))
    assert draw(str(rows), samples=samples, length=length, seed=seed).tolist() == wanda_document_draw(
        documents, samples, length, seed
    )


def test_the_global_generators_are_left_alone(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(0))
    state, torch_state = random.getstate(), torch.get_rng_state()
    first = draw(source)
    assert random.getstate() == state
    assert torch.equal(torch.get_rng_state(), torch_state)
    random.seed(99)
    assert torch.equal(draw(source), first)


def test_seeds_differ(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(0))
    assert not torch.equal(draw(source, seed=0), draw(source, seed=1))


def test_a_document_is_tokenized_at_most_once(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"{index} {text}" for index, text in enumerate(some_documents(0))])
    seen: Counter[str] = Counter()

    def counting(text: str) -> list[int]:
        seen[text] += 1
        return encode(text)

    draw(source, samples=300, encoder=counting)
    assert seen, seen.most_common(3)
    assert max(seen.values()) == 1, seen.most_common(3)


def test_only_drawn_documents_are_tokenized(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a document long enough"] * 1000)
    seen: list[str] = []

    def counting(text: str) -> list[int]:
        seen.append(text)
        return encode(text)

    draw(source, samples=3, encoder=counting)
    assert len(seen) <= 3, len(seen)


def test_one_long_document_in_a_thousand_is_found_quickly(tmp_path: Path) -> None:
    documents = ["short"] * 1000
    documents[617] = "the only document that is longer than a sequence"
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    start_s = time.perf_counter()
    tokens = draw(source, samples=128, length=20)
    elapsed_s = time.perf_counter() - start_s
    assert tokens.tolist() == wanda_document_draw(documents, 128, 20, 0)
    assert elapsed_s < 5, elapsed_s


# Too short, empty, unknown ids


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_documents_that_are_all_too_short_are_refused(tmp_path: Path, write: Callable[..., str]) -> None:
    documents = ["abc"] * 500 + ["exactly8"] + ["ab"] * 500
    source = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", documents)
    message_of(lambda: draw(source, length=8), repr(source), "too short", "8 tokens", "--sequence-length 8")
    assert draw(source, length=7).shape == (5, 7)


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("exactly8")
    message_of(lambda: draw(str(path), length=8), "too short", "8 tokens", "--sequence-length 8")
    assert draw(str(path), length=7).tolist() == [encode("exactly")] * 5


def test_an_empty_calibration_is_refused(tmp_path: Path) -> None:
    rows, table, text = tmp_path / "a.jsonl", tmp_path / "a.parquet", tmp_path / "a.txt"
    rows.write_text("\n")
    write_parquet(table, [])
    text.touch()
    message_of(lambda: draw(str(rows)), repr(str(rows)), "empty")
    message_of(lambda: draw(str(table)), repr(str(table)), "empty")
    message_of(lambda: draw(str(text)), repr(str(text)), "too short", "0 tokens")


@pytest.mark.parametrize("samples", [0, -3])
def test_no_samples_are_refused(tmp_path: Path, samples: int) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", some_documents(0))
    message_of(lambda: draw(source, samples=samples), "--calibration-samples", str(samples))


@pytest.mark.parametrize("bad", [-1, 100, 5000])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, bad: int) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 50)
    message_of(lambda: draw(str(path), vocabulary=100, encoder=lambda _: [99, 0, bad] * 20), f"id {bad} ", "size 100")
    assert draw(str(path), vocabulary=100, encoder=lambda _: [99, 0] * 20).max() == 99


def test_an_unknown_source_names_the_flag() -> None:
    message_of(lambda: draw("pile"), "'pile'", "wikitext2", ".safetensors")
    message_of(lambda: draw("absent.safetensors"), "'absent.safetensors'", "does not exist")


# Tokens as they are


def write_tokens(path: Path, tokens: torch.Tensor, name: str = "input_ids") -> str:
    save_file({name: tokens, "attention_mask": torch.ones(2)}, path)
    return str(path)


def test_token_rows_are_used_in_order_whatever_the_seed(tmp_path: Path) -> None:
    tokens = torch.arange(60).view(6, 10)
    source = write_tokens(tmp_path / "a.safetensors", tokens)
    for samples, seed in [(1, 0), (4, 3), (6, 9)]:
        drawn = draw(source, samples=samples, length=10, seed=seed)
        assert drawn.dtype == torch.int64
        assert torch.equal(drawn, tokens[:samples])


def test_token_rows_are_not_tokenized(tmp_path: Path) -> None:
    source = write_tokens(tmp_path / "a.safetensors", torch.arange(8).view(1, 8))

    def refuse(text: str) -> list[int]:
        raise AssertionError(text)

    assert draw(source, samples=1, encoder=refuse).tolist() == [list(range(8))]


class TestBadTokenFiles:
    def test_fewer_rows_than_samples(self, tmp_path: Path) -> None:
        source = write_tokens(tmp_path / "a.safetensors", torch.zeros(4, 8, dtype=torch.int64))
        message_of(lambda: draw(source), repr(source), "4 rows", "--calibration-samples 5")

    def test_no_rows(self, tmp_path: Path) -> None:
        source = write_tokens(tmp_path / "a.safetensors", torch.zeros(0, 8, dtype=torch.int64))
        message_of(lambda: draw(source, samples=1), "0 rows")

    @pytest.mark.parametrize("length", [0, 7, 9])
    def test_another_sequence_length(self, tmp_path: Path, length: int) -> None:
        source = write_tokens(tmp_path / "a.safetensors", torch.zeros(5, length, dtype=torch.int64))
        message_of(lambda: draw(source), repr(source), f"{length} tokens", "--sequence-length 8")

    @pytest.mark.parametrize("dtype", [torch.int32, torch.float32, torch.bfloat16])
    def test_another_type(self, tmp_path: Path, dtype: torch.dtype) -> None:
        source = write_tokens(tmp_path / "a.safetensors", torch.zeros(5, 8, dtype=dtype))
        message_of(lambda: draw(source), "input_ids", "int64")

    @pytest.mark.parametrize("shape", [(), (8,), (5, 1, 8)])
    def test_another_number_of_dimensions(self, tmp_path: Path, shape: tuple[int, ...]) -> None:
        source = write_tokens(tmp_path / "a.safetensors", torch.zeros(shape, dtype=torch.int64))
        message_of(lambda: draw(source), str(list(shape)), "[rows, sequence length]")

    def test_no_such_tensor(self, tmp_path: Path) -> None:
        source = write_tokens(tmp_path / "a.safetensors", torch.zeros(5, 8, dtype=torch.int64), name="tokens")
        message_of(lambda: draw(source), "2 tensors", "['attention_mask', 'tokens']", "'input_ids'")

    @pytest.mark.parametrize("size", [0, 4, 40, -1])
    def test_truncated(self, tmp_path: Path, size: int) -> None:
        whole = Path(write_tokens(tmp_path / "whole.safetensors", torch.zeros(5, 8, dtype=torch.int64)))
        path = tmp_path / "a.safetensors"
        path.write_bytes(whole.read_bytes()[:size])
        message_of(lambda: draw(str(path)), str(path), "truncated")

    def test_ids_outside_the_vocabulary(self, tmp_path: Path) -> None:
        tokens = torch.arange(8).repeat(5, 1)
        tokens[3, 2] = 256
        source = write_tokens(tmp_path / "a.safetensors", tokens)
        message_of(lambda: draw(source), "id 256 ", "size 256")
        assert draw(source, samples=3).shape == (3, 8)
