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
from neuronal_ray.data.calibration import Calibration, calibration_tokens

VOCABULARY = 256
BUILTIN = Path(neuronal_ray.data.calibration.__file__).parent / "builtin" / "calibration.txt"
RELAXED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


END = 255


def encode(text: str) -> list[int]:
    return list(text.encode("utf-8"))


class Encoding:
    """A tokenizer that adds nothing to a text, and ends documents with END."""

    def __init__(self, encoder: Callable[[str], list[int]]) -> None:
        self._encoder = encoder

    def __call__(self, text: str) -> list[int]:
        return self._encoder(text)

    def end_of_document(self) -> list[int]:
        return [END]


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


def calibrate(
    source: str,
    samples: int = 5,
    length: int = 8,
    seed: int = 0,
    *,
    vocabulary: int = VOCABULARY,
    encoder: Callable[[str], list[int]] = encode,
    packing: str = "off",
) -> Calibration:
    return calibration_tokens(
        source,
        Encoding(encoder),
        samples=samples,
        sequence_length=length,
        seed=seed,
        vocabulary=vocabulary,
        packing=packing,
    )


def draw(source: str, *arguments: int, **keywords: object) -> torch.Tensor:
    return calibrate(source, *arguments, **keywords).tokens  # type: ignore[arg-type]


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
    tokens = draw(source, samples=50, length=11, seed=seed, packing="released")
    assert tokens.dtype == torch.int64
    expected = wanda_document_draw(documents, 50, 11, seed)
    assert tokens.tolist() == expected
    # and the other draws until one is drawn again
    first = next(number for number in range(51) if number == 50 or expected[number] in expected[:number])
    assert draw(source, samples=first, length=11, seed=seed).tolist() == expected[:first]


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_a_text_file_is_drawn_as_wanda_draws_wikitext2(tmp_path: Path, seed: int) -> None:
    text = "\n".join(some_documents(seed))
    (tmp_path / "a.txt").write_bytes(text.encode())
    tokens = draw(str(tmp_path / "a.txt"), samples=50, length=11, seed=seed, packing="released")
    assert tokens.tolist() == wanda_running_draw(text, 50, 11, seed)


def test_a_single_row_is_still_drawn_as_a_document(tmp_path: Path) -> None:
    text = "one document, longer than a sequence"
    source = write_jsonl(tmp_path / "a.jsonl", [text])
    assert draw(source, samples=20, packing="released").tolist() == wanda_document_draw([text], 20, 8, 0)


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
    assert draw(source, samples=20, seed=5, packing="released").tolist() == expected


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
        for packing in ("released", "off", "on"):
            try:
                tokens = draw(source, samples=samples, length=length, seed=seed, packing=packing)
            except BadInput:
                assert packing != "released"
                continue
            assert tokens.shape == (samples, length)
            assert packing == "released" or len(tokens.unique(dim=0)) == samples, (packing, tokens)
            assert torch.equal(tokens, draw(source, samples=samples, length=length, seed=seed, packing=packing))
            few = min(first, samples)
            assert torch.equal(tokens[:few], draw(source, samples=few, length=length, seed=seed, packing=packing))
    released = draw(str(rows), samples=samples, length=length, seed=seed, packing="released")
    assert released.tolist() == wanda_document_draw(documents, samples, length, seed)


# No sequence twice, and short documents joined


def all_windows(documents: list[str], length: int) -> set[tuple[int, ...]]:
    """Every sequence that the released code can draw."""
    return {
        tuple(encode(text)[start : start + length])
        for text in documents
        for start in range(max(0, len(encode(text)) - length))
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_distinct_sequence_is_drawn_before_the_source_is_refused(tmp_path: Path, seed: int) -> None:
    documents = ["aaaaaaaaaaaaaaaaaaaaaaaa", "abcabcabcabcabcabcabc", "x", "abcabcabcabc", "0123456789", "0123456789"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    there = all_windows(documents, 8)
    found = calibrate(source, samples=len(there), seed=seed)
    assert {tuple(row) for row in found.tokens.tolist()} == there
    assert (found.distinct, found.packed) == (len(there), False)
    more = len(there) + 1
    message_of(
        lambda: draw(source, samples=more, seed=seed),
        f"only {len(there)} distinct",
        f"--calibration-samples {more}",
        "--calibration-packing",
    )


def test_one_window_in_a_million_starts_is_found_quickly(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1_000_000 + "b" + "c" * 20)
    start_s = time.perf_counter()
    tokens = draw(str(tmp_path / "a.txt"), samples=21, length=20)
    elapsed_s = time.perf_counter() - start_s
    assert len(tokens.unique(dim=0)) == 21, tokens
    assert elapsed_s < 10, elapsed_s


def test_short_documents_are_joined_in_the_order_of_the_draw(tmp_path: Path) -> None:
    documents = ["abc", "", "defgh", "ij", "klmnopq", "r"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    generator, order = random.Random(3), []
    while len(order) < len(documents):
        index = generator.randint(0, len(documents) - 1)
        if index not in order:
            order.append(index)
    text = [token for index in order if documents[index] for token in [*encode(documents[index]), END]]
    windows = [text[start : start + 7] for start in range(0, len(text) - 6, 7)]
    assert draw(source, samples=len(windows), length=7, seed=3, packing="on").tolist() == windows
    message_of(
        lambda: draw(source, samples=9, length=7, seed=3, packing="on"), "only 3 distinct", "--calibration-samples 9"
    )


def test_joined_documents_leave_room_for_windows_of_longer_ones(tmp_path: Path) -> None:
    documents = ["abc"] * 10 + ["0123456789"]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    found = {bytes(row) for row in draw(source, samples=3, length=8, packing="on").tolist()}
    assert found == {b"01234567", b"12345678", b"abc\xff" * 2}
    message_of(lambda: draw(source, samples=4, length=8, packing="on"), "only 3 distinct")


class TestAutomaticPacking:
    def test_few_long_documents_among_short_ones(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        documents = [f"{n} short" for n in range(500)] + ["0123456789abcdef"] * 2
        source = write_jsonl(tmp_path / "a.jsonl", documents)
        with caplog.at_level("INFO"):
            found = calibrate(source, samples=20, length=15, packing="auto")
        assert (found.packed, found.distinct) == (True, 20)
        assert torch.equal(found.tokens, draw(source, samples=20, length=15, packing="on"))
        (line,) = caplog.messages
        assert "--calibration-packing auto: on" in line, line

    def test_only_short_documents(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", [f"{n} short" for n in range(500)])
        assert calibrate(source, samples=20, length=15, packing="auto").packed

    def test_long_documents_are_drawn_as_ever_however_many_are_short(self, tmp_path: Path) -> None:
        documents = [f"{n} short" for n in range(900)] + [f"document {n} is much longer" for n in range(200)]
        source = write_jsonl(tmp_path / "a.jsonl", documents)
        found = calibrate(source, samples=10, length=20, packing="auto")
        assert not found.packed
        assert found.tokens.tolist() == wanda_document_draw(documents, 10, 20, 0)

    def test_a_text_is_never_packed(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("one text of a few words")
        assert not calibrate(str(tmp_path / "a.txt"), samples=10, packing="auto").packed
        message_of(lambda: draw(str(tmp_path / "a.txt"), samples=16, packing="auto"), "only 15 distinct")

    def test_too_few_in_any_way(self, tmp_path: Path) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", ["abc"] * 3)
        message_of(lambda: draw(source, samples=9, packing="auto"), "only 1 distinct", "--calibration-samples 9")
        message_of(lambda: draw(source, samples=9, length=99, packing="auto"), "too short", "9 tokens in all")

    def test_not_on_means_a_warning(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        source = write_jsonl(tmp_path / "a.jsonl", [f"{n} short" for n in range(500)] + ["0123456789abcdefghijklm"])
        draw(source, samples=5, length=15, packing="off")
        (line,) = caplog.messages
        for part in ("--calibration:", "different tokens of 75", "--calibration-packing on"):
            assert part in line, line


def test_the_released_draw_repeats_itself_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["short"] * 50 + ["012345678"])
    found = calibrate(source, samples=12, packing="released")
    assert (found.distinct, found.tokens.tolist()) == (1, [encode("01234567")] * 12)
    (line,) = caplog.messages
    assert "only 1 of the 12" in line, line


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

    draw(source, samples=100, encoder=counting)
    assert seen, seen.most_common(3)
    assert max(seen.values()) == 1, seen.most_common(3)


def test_only_drawn_documents_are_tokenized(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a document that is long enough"] * 1000)
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
    tokens = draw(source, samples=128, length=20, packing="released")
    elapsed_s = time.perf_counter() - start_s
    assert tokens.tolist() == wanda_document_draw(documents, 128, 20, 0)
    assert elapsed_s < 5, elapsed_s


# Too short, empty, unknown ids


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_documents_that_are_all_too_short_are_refused(tmp_path: Path, write: Callable[..., str]) -> None:
    documents = ["abc"] * 500 + ["exactly8"] + ["ab"] * 500
    source = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", documents)
    message_of(lambda: draw(source, length=8), repr(source), "too short", "8 tokens", "--sequence-length 8")
    assert draw(source, samples=1, length=7).shape == (1, 7)


def test_a_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("exactly8")
    message_of(lambda: draw(str(path), length=8), "too short", "8 tokens", "--sequence-length 8")
    assert draw(str(path), samples=1, length=7).tolist() == [encode("exactly")]


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
    message_of(
        lambda: draw(str(path), samples=3, vocabulary=100, encoder=lambda _: [99, 0, bad] * 20),
        f"id {bad} ",
        "size 100",
    )
    assert draw(str(path), samples=2, vocabulary=100, encoder=lambda _: [99, 0] * 20).max() == 99


def test_an_unknown_source_names_the_flag() -> None:
    message_of(lambda: draw("pile"), "'pile'", "wikitext2", ".safetensors")
    message_of(lambda: draw("absent.safetensors"), "'absent.safetensors'", "does not exist")


# Tokens as they are


def write_tokens(path: Path, tokens: torch.Tensor, name: str = "input_ids") -> str:
    save_file({name: tokens, "labels": torch.ones(2)}, path)
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
        message_of(lambda: draw(source), "2 tensors", "['labels', 'tokens']", "'input_ids'")

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


def write_rows(path: Path, **tensors: torch.Tensor) -> str:
    save_file(tensors, path)
    return str(path)


def test_padding_is_no_part_of_a_sequence(tmp_path: Path) -> None:
    ids = torch.arange(6 * 8).view(6, 8)
    mask = torch.ones_like(ids)
    path = tmp_path / "rows.safetensors"
    assert torch.equal(draw(write_rows(path, input_ids=ids, attention_mask=mask)), ids[:5])
    mask[:, 5:] = 0
    ids[:, 5:] = VOCABULARY  # no token of the model
    assert torch.equal(draw(write_rows(path, input_ids=ids, attention_mask=mask)), ids[:5, :5]), "all have 5 tokens"
    mask[1, 2:] = 0
    real = ids[mask.bool()]
    joined = calibrate(write_rows(path, input_ids=ids, attention_mask=mask.bool()), samples=3)
    assert torch.equal(joined.tokens, real[:24].view(3, 8))
    assert joined.packed
    message_of(lambda: draw(str(path)), "27 tokens", "3 sequences", "--calibration-samples 5")


def test_a_mask_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    ids = torch.ones(6, 8, dtype=torch.int64)
    for mask in (ids[:5], ids * 2, torch.full((6, 8), torch.nan), ids[0]):
        source = write_rows(tmp_path / "rows.safetensors", input_ids=ids, attention_mask=mask.clone())
        message_of(lambda source=source: draw(source), "attention_mask", "[6, 8]")
