"""Whatever is at a path ends in one line that names flag, file and place, or in the value."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import (
    check_file,
    check_path,
    checked,
    is_directory,
    is_file,
    parse_json,
    read_json,
    read_text,
    read_toml,
)


@dataclass(frozen=True, kw_only=True)
class Recorded:
    name: str
    size: int
    share: float
    shape: tuple[int, ...] = ()


GOOD = {"name": "a", "size": 1, "share": 0.5, "shape": [1, 2]}


def test_what_is_of_the_right_form_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "a", "size": 1, "share": 2, "shape": [1, 2], "more": null}')
    assert read_json(tmp_path / "a.json", Recorded, flag="--x") == Recorded(name="a", size=1, share=2.0, shape=(1, 2))
    (tmp_path / "a.toml").write_text("a = [1]")
    assert read_toml(tmp_path / "a.toml", flag="--x") == {"a": [1]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "the key 'a' is there twice"),
        ('["\\ud800"]', "an unpaired surrogate"),
        ("[9223372036854775808]", "beyond 64 bits"),
        ("[" + "9" * 5000 + "]", "beyond 64 bits"),
        ("[1e999]", "beyond 64 bits"),
        ("[NaN]", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ('["\0"]', "not JSON"),
    ],
)
def test_json_that_is_not_strict(text: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=f"^--x: file: .*{complaint}"):
        parse_json(text, place="--x: file")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"size": "1"}, "size: '1': input should be a valid integer"),
        ({"size": True}, "size: True: input should be a valid integer"),
        ({"size": None}, "size: None: input should be a valid integer"),
        ({"shape": [1, "2"]}, r"shape.1: '2': input should be a valid integer"),
        ({"name": ["a"], "size": []}, r"name: \['a'\]: input should be a valid string \(and 1 more\)"),
    ],
)
def test_values_of_another_type(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(BadInput, match=f"^--x: file: {complaint}"):
        checked(GOOD | change, Recorded, place="--x: file")


def test_a_missing_key_and_another_kind_of_document() -> None:
    with pytest.raises(BadInput, match=r"^p: size is missing"):
        checked({"name": "a", "share": 1.0}, Recorded, place="p")
    with pytest.raises(BadInput, match=r"^p: \[1\]: input should be an object"):
        checked([1], Recorded, place="p")


def test_what_is_at_a_path(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "cycle").symlink_to(tmp_path / "cycle")
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "file").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name, complaint in {
        "absent": "does not exist",
        "folder": "is a directory",
        "fifo": "is a device or a FIFO",
        "dangling": "is a link to a file that does not exist",
        "cycle": "Too many levels of symbolic links",
        "file/below": "Not a directory",
        "latin": "is not UTF-8",
        "n" * 256: "too long",
    }.items():
        with pytest.raises(BadInput, match=f"^--x: .*{complaint}"):
            read_text(tmp_path / name, flag="--x")
        if name not in ("folder", "fifo", "latin", "absent", "dangling"):  # there, or nothing: that can be seen
            for look in (is_directory, is_file):
                with pytest.raises(BadInput, match=f"^--x: .*{complaint}"):
                    look(tmp_path / name, flag="--x")
    assert check_file(tmp_path / "link", flag="--x") == 1
    there = [path for path in sorted(tmp_path.iterdir()) if path.name != "cycle"]
    assert [path.name for path in there if is_directory(path, flag="")] == ["folder"]
    assert [path.name for path in there if is_file(path, flag="")] == ["file", "latin", "link"]


@pytest.mark.parametrize(
    ("path", "complaint"), [("a\0b", "NUL"), ("\ud800", "surrogates"), ("a/" * 2100, "too long"), (" ", "blank")]
)
def test_paths_that_cannot_be(path: str, complaint: str) -> None:
    with pytest.raises(BadInput, match=f"^--x: .*{complaint}"):
        check_path(Path(path), flag="--x")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "size", "share", "shape"]), inner)
    ),
)


@given(value=JSON)
def test_a_value_of_any_form_is_read_or_refused(value: object) -> None:
    with suppress(BadInput):
        assert isinstance(checked(value, Recorded, place="p"), Recorded)
