"""Headers of safetensors files: what safetensors writes is read, anything else is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import read_header

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: object, data: int = 24) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(BadInput, match=r"^--here: ") as error:
        read_header(path, flag="--here")
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    assert path.name in message, message
    return message


def test_what_safetensors_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(0, 4), "c": torch.tensor(1), "d": torch.zeros(5).bool()}
    save_file(tensors, tmp_path / "t", metadata={"format": "pt"})
    header = read_header(tmp_path / "t")
    assert {name: stored.shape for name, stored in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ({"a": GOOD | {"data_offsets": [-24, 0]}}, "data_offsets"),
        ({"a": GOOD | {"data_offsets": [24, 0]}}, "data_offsets"),
        ({"a": GOOD | {"data_offsets": [0.0, 24.0]}}, "data_offsets"),
        ({"a": GOOD | {"data_offsets": [0]}}, "data_offsets"),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, "data_offsets"),
        ({"a": GOOD | {"shape": [2, 4]}}, "takes 32 bytes"),
        ({"a": GOOD | {"shape": [-2, -3]}}, "shape"),
        ({"a": GOOD | {"shape": [True, 6]}}, "shape"),
        ({"a": GOOD | {"shape": 6}}, "shape"),
        ({"a": GOOD | {"dtype": "F31"}}, "unknown dtype"),
        ({"a": GOOD | {"dtype": ["F32"]}}, "unknown dtype"),
        ({"a": GOOD, "b": GOOD}, "overlap"),
        (
            {"a": GOOD | {"shape": [2], "data_offsets": [0, 8]}, "b": GOOD | {"shape": [2], "data_offsets": [16, 24]}},
            "hole",
        ),
        ({"a": GOOD | {"shape": [2], "data_offsets": [16, 24]}}, "first 16 bytes"),
        ({"a": GOOD, "__metadata__": {"deep": {"er": "1"}}}, "__metadata__"),
        ({"a": GOOD, "__metadata__": None}, "__metadata__"),
        ({"\ud800": GOOD}, "surrogate"),
        ([GOOD], "object"),
        (b'{"a": {"dtype":"F32","shape":[6],"data_offsets":[0,24]}, "a": {}}', "twice"),
        (b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', "NaN"),
        (b'{"a": {"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,24]}}', "64 bits"),
        (b"[" * 50_000, "nested too deeply"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_header_that_cannot_be_so_is_refused(tmp_path: Path, header: object, expected: str) -> None:
    assert expected in refusal(write(tmp_path / "t", header))


def test_a_header_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "t").open("wb") as file:
        file.write((3 * 2**30).to_bytes(8, "little"))
        file.truncate(4 * 2**30)
    assert "3,221,225,472" in refusal(tmp_path / "t")


sizes = st.integers(-1, 4) | st.sampled_from([True, None, 1.0, "1", 2**40])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "X", 3]),
        "shape": st.lists(sizes, max_size=3) | sizes,
        "data_offsets": st.lists(st.integers(-4, 32), min_size=1, max_size=3) | sizes,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries | st.none(), max_size=3)


@given(header=headers, data=st.integers(0, 32))
def test_no_header_is_read_that_safetensors_refuses(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, object], data: int
) -> None:
    path = write(tmp_path_factory.mktemp("header") / "t", header, data)
    try:
        found = read_header(path)
    except BadInput:
        return
    try:
        with safe_open(path, framework="pt") as file:
            assert sorted(file.keys()) == sorted(found.tensors)
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses {header} ({error}), this project reads it") from error
