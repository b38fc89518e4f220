"""A journal's lines: whole ones are read back in order, damaged ones are as if they were not there."""

from pathlib import Path

import pytest

from neuronal_ray.cli.json_lines import append_line, read_lines

ENTRIES = [{"kind": "kl", "values": [0.1, 1e-300]}, {"text": "two\nlines, \u03bb"}, {}]


def test_entries_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for entry in ENTRIES:
        append_line(path, entry)
    assert list(read_lines(path)) == ENTRIES


def test_a_file_that_does_not_exist_has_no_entries(tmp_path: Path) -> None:
    assert list(read_lines(tmp_path / "absent.jsonl")) == []


@pytest.mark.parametrize("damage", [b"\n{", b'\n{"kind": "k', b"\n[1, 2]", b"\n\xff\xfe", b"\n\0\0\0", b"\n", b"\n\n"])
def test_a_damaged_line_is_left_out_and_the_next_is_whole(damage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    append_line(path, ENTRIES[0])
    with path.open("ab") as file:
        file.write(damage)
    append_line(path, ENTRIES[1])
    assert list(read_lines(path)) == ENTRIES[:2]


def test_a_file_cut_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for entry in ENTRIES:
        append_line(path, entry)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        found = list(read_lines(path))
        assert found == ENTRIES[: len(found)], length
        append_line(path, ENTRIES[0])
        assert list(read_lines(path)) == [*found, ENTRIES[0]], length
