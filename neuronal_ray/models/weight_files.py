"""Which files of a model's directory have its weights: transformers' choice, made here for all readers and writers.

transformers takes model.safetensors if there is one, and otherwise the files that model.safetensors.index.json lists.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|msgpack|h5|npz|ot|pb|tflite|mlmodel|distcp|onnx([._]data)?)$"
    r"|\.index(\.[^.]+)?\.json$"
)
_SHOWN = 4


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that a model is loaded from, the index that lists them, and the names of weights that are ignored."""

    paths: tuple[Path, ...]
    index: Path | None
    ignored: tuple[str, ...]

    def ignored_in_words(self) -> str | None:
        """Return one line that says what is loaded and what is ignored; None when nothing is."""
        if not self.ignored:
            return None
        taken = self.paths[0].name if self.index is None else f"the files of {self.index.name}"
        more = f" and {len(self.ignored) - _SHOWN} more" if len(self.ignored) > _SHOWN else ""
        return (
            f"{self.paths[0].parent} has weights twice or in several forms: {taken} is used, as transformers does; "
            f"ignored and not copied: {', '.join(self.ignored[:_SHOWN])}{more}"
        )


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What is used of an index."""

    metadata: dict[str, Any]
    weight_map: dict[str, str]


def is_weight_file(name: str) -> bool:
    """Return whether a file of this name has weights, in any format, or lists files that do."""
    return _WEIGHTS.search(name) is not None


def find_weight_files(path: Path, *, flag: str = "--model") -> WeightFiles:
    """Choose among the weights in the directory `path`. Raises BadInput when there are none that can be read."""
    index = path / INDEX
    if (path / SINGLE).is_file():
        taken, index_used = [path / SINGLE], None
    elif index.is_file():
        taken, index_used = listed_files(index, flag=flag), index
    else:
        raise BadInput(f"{flag}: {_what_is_there(path)}")
    used = {file.name for file in taken} | ({INDEX} if index_used else set())
    names = sorted(file.name for file in path.iterdir() if file.is_file() and is_weight_file(file.name))
    return WeightFiles(paths=tuple(taken), index=index_used, ignored=tuple(name for name in names if name not in used))


def listed_files(index: Path, *, flag: str) -> list[Path]:
    """Return the files of an index, sorted. Raises BadInput unless all of them lie in its directory."""
    names = index_entries(index, flag=flag)
    for name in names:
        if not (index.parent / name).is_file():
            raise BadInput(f"{flag}: {index.parent / name} is missing, and {index.name} lists it")
    return [index.parent / name for name in names]


def read_index(index: Path, *, flag: str) -> dict[str, str]:
    """Return the file of each tensor that an index lists."""
    return read_json(index, _Index, flag=flag).weight_map


def index_entries(index: Path, *, flag: str) -> list[str]:
    """Return the names of the files in an index, sorted. Raises BadInput for one that is not in its directory."""
    names = sorted(set(read_index(index, flag=flag).values()))
    if not names:
        raise BadInput(f"{flag}: {index} is not the index of a sharded checkpoint: it lists no tensors")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise BadInput(f"{flag}: {index} lists {name!r:.60}, expected names of safetensors files in its directory")
    return names


def _what_is_there(path: Path) -> str:
    """Say why a directory without the weights of transformers' names cannot be read."""
    if any(path.glob("packed*.safetensors")):
        return f"{path} is a packed model; neuronal_ray.load_packed reads it"
    if (path / SINGLE).is_symlink() or (path / INDEX).is_symlink():
        return f"the weights in {path} are a link to a file that does not exist"
    names = [file.name for file in path.iterdir() if file.is_file()]
    return f"{path / SINGLE} is missing; {only_safetensors(names, str(path))}"


def only_safetensors(names: Iterable[str], model: str) -> str:
    """Return what to do with a `model` that has files of these names, none of which can be read, as a sentence."""
    others = sorted(name for name in names if is_weight_file(name) and "/" not in name)
    if any(name.startswith("pytorch_model") for name in others):
        command = (
            "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
            f"m, d = {model!r}, {Path(model).name + '-safetensors'!r}; "
            "M.from_pretrained(m, dtype='auto', weights_only=True).save_pretrained(d); "
            "T.from_pretrained(m).save_pretrained(d)"
        )
        return f'only safetensors are read, and {model} has {others[0]}; convert it: python -c "{command}"'
    found = f"; {model} has {', '.join(others[:_SHOWN])}" if others else ""
    return f"only safetensors checkpoints are read{found}"
