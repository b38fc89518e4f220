"""A journal's lines: whole ones are read back in order, a last one cut short is dropped, other damage is refused."""

import logging
from pathlib import Path

import pytest

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.json_lines import JsonLines

ENTRIES = [{"kind": "kl", "values": [0.1, 1e-300]}, {"text": "two\nlines, \u03bb"}, {}]


def journal(path: Path) -> JsonLines:
    return JsonLines(path, flag="--resume")


def values(path: Path) -> list[dict[str, object]]:
    return [line.value for line in journal(path).read()]


def test_entries_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for entry in ENTRIES:
        journal(path).append(entry)
    assert values(path) == ENTRIES


def test_a_file_that_does_not_exist_has_no_entries(tmp_path: Path) -> None:
    assert values(tmp_path / "absent.jsonl") == []


@pytest.mark.parametrize("damage", [b"\n{", b'\n{"kind": "k', b"\n\xff\xfe", b"\n\0\0\0", b"\n{]\n"])
def test_a_last_line_cut_short_is_dropped_aloud_and_the_next_is_whole(
    damage: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.jsonl"
    journal(path).append(ENTRIES[0])
    with path.open("ab") as file:
        file.write(damage)
    content = path.read_bytes()
    taken_up = journal(path)
    with caplog.at_level(logging.WARNING):
        assert [line.value for line in taken_up.read()] == ENTRIES[:1]
    assert f"--resume: line 3 of {path}, the last, was cut short and is dropped" in caplog.text
    assert path.read_bytes() == content, "reading changed the file"
    taken_up.append(ENTRIES[1])
    assert values(path) == ENTRIES[:2]


@pytest.mark.parametrize("damage", ["{", '{"kind": "k', "[1, 2]", "\0", '{"a": 1, "a": 2}', '{"a": NaN}'])
def test_damage_before_the_last_line_is_refused_with_its_number(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(f'{{"first": 1}}\n{damage}\n{{"third": 3}}\n')
    with pytest.raises(BadInput, match=f"--resume: line 2 of {path}"):
        journal(path).read()


def test_a_file_cut_at_any_byte_keeps_every_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    for entry in ENTRIES:
        journal(path).append(entry)
    content = path.read_bytes()
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        taken_up = journal(path)
        found = [line.value for line in taken_up.read()]
        assert found == ENTRIES[: len(found)], length
        taken_up.append(ENTRIES[0])
        assert values(path) == [*found, ENTRIES[0]], length
