"""Does each window begin with one BOS, and is the rest the text, all of it, in order?"""

import json
from pathlib import Path

from neuronal_ray.data.calibration import calibration_tokens
from neuronal_ray.data.window_start import WithoutBos
from neuronal_ray.data.windows import evaluation_windows

BOS, LENGTH = 0, 8


class Letters:
    """A letter is a token; BOS is in front of a text."""

    def __call__(self, text: str) -> list[int]:
        return [BOS, *(1 + ord(letter) - ord("a") for letter in text)]

    def end_of_document(self) -> list[int]:
        return []


def letters(count: int) -> str:
    return "".join(chr(ord("a") + place % 26) for place in range(count))


def test_windows_are_bos_and_consecutive_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(letters(30))
    windows = evaluation_windows(str(path), Letters(), sequence_length=LENGTH, vocabulary=27, bos=BOS)
    assert windows.shape == (30 // 7, LENGTH)
    assert windows[:, 0].tolist() == [BOS] * 4
    assert windows[:, 1:].flatten().tolist() == Letters()(letters(28))[1:]


def test_windows_as_the_papers_cut_them_have_one_bos(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(letters(30))
    windows = evaluation_windows(str(path), Letters(), sequence_length=LENGTH, vocabulary=27)
    assert windows.flatten().tolist() == Letters()(letters(30))[:24]


def test_calibration_sequences_are_bos_and_a_piece_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(letters(200))
    text = Letters()(letters(200))[1:]
    pieces = {tuple(text[start : start + LENGTH - 1]) for start in range(200)}
    drawn = calibration_tokens(str(path), Letters(), samples=5, sequence_length=LENGTH, seed=0, vocabulary=27, bos=BOS)
    for row in drawn.tokens.tolist():
        assert row[0] == BOS
        assert tuple(row[1:]) in pieces, row


def test_every_bos_that_a_text_begins_with_is_left_out() -> None:
    class Twice(Letters):
        def __call__(self, text: str) -> list[int]:
            return [BOS, *super().__call__(text)]

    assert WithoutBos(Twice(), BOS)("ab") == [1, 2]
    assert WithoutBos(Twice(), BOS)("") == []


def test_a_packed_window_that_is_cut_before_a_separator_has_one_bos(tmp_path: Path) -> None:
    """Each document fills a window, and BOS is between them."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": letters(26)[start:][: LENGTH - 1]}) + "\n" for start in range(12)))
    drawn = calibration_tokens(
        str(path), Letters(), samples=9, sequence_length=LENGTH, seed=0, vocabulary=27, packing="on", bos=BOS
    )
    starts = drawn.tokens[:, :2].tolist()
    assert all(row[0] == BOS and row[1] != BOS for row in starts), starts
