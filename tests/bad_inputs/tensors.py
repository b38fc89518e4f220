"""safetensors files: headers that contradict themselves or the model, and weights that cannot be computed with."""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bad_inputs.case import Case, Damage, each
from bad_inputs.good import tensors_of, write_tensors
from bad_inputs.json_damage import drawn, text_damages
from hypothesis import strategies as st

Header = dict[str, Any]

_COMMANDS = ("prune", "prune --dry-run", "evaluate", "export", "export --format packed", "sweep --dry-run")
_FILE = "model/model.safetensors"
_NAMED = ("--model", "model.safetensors")
_UP = "model.layers.1.mlp.up_proj.weight"
_DOWN = "model.layers.1.mlp.down_proj.weight"
_MASKS_NAMED = ("--masks", "masks.safetensors")


def cases() -> Iterator[Case]:
    """All of this file."""
    for what, change in _header_changes().items():
        yield from each(_COMMANDS, reader="safetensors", what=what, named=_NAMED, damage=_header(_FILE, change))
    for what, rewrite in _raw_changes().items():
        yield from each(_COMMANDS, reader="safetensors", what=what, named=_NAMED, damage=_raw(_FILE, rewrite))
        yield from each(
            ("export --masks",), reader="masks", what=what, named=_MASKS_NAMED,
            damage=_raw("masks.safetensors", rewrite),
        )  # fmt: skip
    for number, edit in enumerate(drawn(_offset_edits(), 60, number=3)):
        damage = _header(_FILE, edit.apply)
        yield from each(
            ("prune --dry-run", "evaluate", "export"), reader="safetensors", what=f"drawn {number}: {edit}",
            named=_NAMED, damage=damage,
        )  # fmt: skip
    yield from _weights()
    yield from _harmless()


def _split(content: bytes) -> tuple[Header, bytes]:
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _joined(header: Header | bytes, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _header(file: str, change: Callable[[Header], object]) -> Damage:
    def damage(folder: Path) -> Sequence[str]:
        header, data = _split((folder / file).read_bytes())
        change(header)
        (folder / file).write_bytes(_joined(header, data))
        return []

    return damage


def _raw(file: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> Sequence[str]:
        (folder / file).write_bytes(change((folder / file).read_bytes()))
        return []

    return damage


def _header_changes() -> dict[str, Callable[[Header], object]]:
    def of(**values: object) -> Callable[[Header], object]:
        return lambda header: header[_UP].update(values)

    def offsets(change: Callable[[int, int], object]) -> Callable[[Header], object]:
        return lambda header: header[_UP].update(data_offsets=change(*header[_UP]["data_offsets"]))

    changes: dict[str, Callable[[Header], object]] = {
        "offsets negative": offsets(lambda begin, end: [-begin - 8, end]),
        "offsets swapped": offsets(lambda begin, end: [end, begin]),
        "offsets beyond the file": offsets(lambda begin, end: [begin + 2**40, end + 2**40]),
        "offsets beyond 64 bits": offsets(lambda begin, _: [begin, 2**70]),
        "offsets overlapping": offsets(lambda begin, end: [begin - 8, end - 8]),
        "offsets float": offsets(lambda begin, end: [float(begin), float(end)]),
        "offsets half": offsets(lambda begin, end: [begin + 0.5, end + 0.5]),
        "offsets strings": offsets(lambda begin, end: [str(begin), str(end)]),
        "offsets null": offsets(lambda *_: None),
        "offsets three": offsets(lambda begin, end: [begin, end, end]),
        "offsets one": offsets(lambda begin, _: [begin]),
        "offsets empty": offsets(lambda *_: []),
        "offsets too short": offsets(lambda begin, end: [begin, end - 4]),
        "offsets equal": offsets(lambda begin, _: [begin, begin]),
        "offsets true": offsets(lambda _, end: [True, end]),
        "no offsets": lambda header: header[_UP].pop("data_offsets"),
        "no shape": lambda header: header[_UP].pop("shape"),
        "no dtype": lambda header: header[_UP].pop("dtype"),
        "a hole": lambda header: header.pop(_UP),
        "a tensor that is a list": lambda header: header.update({_UP: []}),
        "a tensor that is null": lambda header: header.update({_UP: None}),
        "a tensor that is a number": lambda header: header.update({_UP: 3}),
        "all tensors twice in one place": lambda header: header.update(more=header[_UP]),
        "metadata nested": lambda header: header.update(__metadata__={"format": {"a": 1}}),
        "metadata a list": lambda header: header.update(__metadata__=["pt"]),
        "metadata a number": lambda header: header.update(__metadata__={"format": 3}),
        "metadata a string": lambda header: header.update(__metadata__="pt"),
        "a surrogate name": lambda header: header.update({"\ud800": header.pop(_UP)}),
        "another name": lambda header: header.update({"model.layers.1.mlp.up_proj.wait": header.pop(_UP)}),
        "no tensors": lambda header: header.clear(),
    }
    for shape in (
        [48],
        [32, 48],
        [48, 32, 1],
        [47, 32],
        [-48, -32],
        [48.0, 32.0],
        ["48", "32"],
        None,
        1536,
        [0, 0],
        [],
    ):
        changes[f"shape {shape}"] = of(shape=shape)
    changes["shape beyond 64 bits"] = of(shape=[2**63, 2**63])
    for dtype in ("F99", "", 3, None, "f32", "FLOAT", "torch.float32", ["F32"], "I32", "U32", "F64", "BOOL", "F8_E4M3"):
        changes[f"dtype {dtype!r}"] = of(dtype=dtype)
    return changes


def _raw_changes() -> dict[str, Callable[[bytes], bytes]]:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "nothing": lambda _: b"",
        "three bytes": lambda content: content[:3],
        "the length only": lambda content: content[:8],
        "half of the header": lambda content: content[:100],
        "cut": lambda content: content[:-100],
        "one byte short": lambda content: content[:-1],
        "longer": lambda content: content + bytes(64),
        "a header of no bytes": lambda content: bytes(8) + content[8:],
        "a header of gigabytes": lambda content: struct.pack("<Q", 2**33) + content[8:],
        "a header of 2**63 bytes": lambda content: struct.pack("<Q", 2**63) + content[8:],
        "a header of 2**64 - 1 bytes": lambda content: struct.pack("<Q", 2**64 - 1) + content[8:],
        "a pickle": lambda _: b"\x80\x02}q\x00." + bytes(200),
        "a zip file": lambda _: b"PK\x03\x04" + bytes(200),
        "text": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "a page": lambda _: b"<html><body>404</body></html>",
        "zeros": lambda _: bytes(4096),
    }
    for what, change in text_damages():
        if what not in ("empty", "a comma too many"):
            changes[f"header: {what}"] = lambda content, change=change: _changed_header(content, change)  # type: ignore[misc]
    changes["header: a tensor twice"] = lambda content: _changed_header(content, _doubled)
    return changes


def _changed_header(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    return _joined(change(content[8 : 8 + length].strip()), content[8 + length :])


def _doubled(header: bytes) -> bytes:
    name, entry = next((name, entry) for name, entry in json.loads(header).items() if name != "__metadata__")
    return header[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()


class _Edit:
    """A change of one offset or size of one tensor, which can no longer fit its neighbors."""

    def __init__(self, place: int, field: str, which: int, by: int) -> None:
        self._place, self._field, self._which, self._by = place, field, which, by

    def apply(self, header: Header) -> None:
        """Change the header."""
        names = [name for name in header if name != "__metadata__"]
        entry = header[names[self._place % len(names)]][self._field]
        entry[self._which % len(entry)] += self._by

    def __str__(self) -> str:
        return f"{self._field}[{self._which}] of {self._place} {self._by:+}"


def _offset_edits() -> st.SearchStrategy[_Edit]:
    amounts = st.one_of(
        st.integers(-64, -1), st.integers(1, 64), st.integers(2**31, 2**62), st.integers(-(2**62), -(2**31))
    )
    return st.builds(_Edit, st.integers(0, 29), st.sampled_from(["shape", "data_offsets"]), st.integers(0, 1), amounts)


def _weights() -> Iterator[Case]:
    def poisoned(name: str, value: float) -> Damage:
        def damage(folder: Path) -> Sequence[str]:
            tensors = tensors_of(folder)
            tensors[name].view(-1)[:: 7 if tensors[name].dim() == 2 else 1] = value
            write_tensors(folder, tensors)
            return []

        return damage

    def cast(name: str, dtype: torch.dtype) -> Damage:
        def damage(folder: Path) -> Sequence[str]:
            tensors = tensors_of(folder)
            tensors[name] = tensors[name].to(dtype)
            write_tensors(folder, tensors)
            return []

        return damage

    linears = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    parts = [*linears, "input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{block}.{part}.weight" for block in range(3) for part in parts]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    for name in names:
        for value in (torch.nan, torch.inf, -torch.inf):
            yield from each(
                ("prune", "evaluate"), reader="weights", what=f"{value} in {name}", named=("--model",),
                damage=poisoned(name, value),
            )  # fmt: skip
    for dtype in (torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64):
        for name in (_UP, _DOWN, "model.norm.weight"):
            commands = _COMMANDS if name != "model.norm.weight" else ("prune", "prune --dry-run", "evaluate")
            yield from each(
                commands, reader="weights", what=f"{name} is {dtype}", named=("--model",), damage=cast(name, dtype)
            )


def _harmless() -> Iterator[Case]:
    def more(folder: Path) -> Sequence[str]:
        write_tensors(folder, tensors_of(folder) | {"more": torch.ones(3)})
        return []

    def half(folder: Path) -> Sequence[str]:
        write_tensors(folder, {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(folder).items()})
        return []

    for what, damage in (("a tensor too many", more), ("bfloat16", half)):
        yield from each(
            ("prune", "evaluate", "export"), reader="weights", what=what, named=(), damage=damage, harmless=True
        )
    unlabeled = _header(_FILE, lambda header: header.pop("__metadata__", None))
    yield from each(
        ("prune", "evaluate"), reader="safetensors", what="no metadata", named=(), damage=unlabeled, harmless=True
    )
