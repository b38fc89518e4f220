"""config.json, the index and the tokenizer's files: unreadable, or with values that no model can be made from."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bad_inputs.case import Case, Damage, each
from bad_inputs.good import EXPORTS, LOADS, tensors_of
from bad_inputs.json_damage import edit, put, rewrite, text_damages, wrong_types
from safetensors.torch import save_file

_READS_CONFIG = (*LOADS, *EXPORTS, "export --masks")
_QUICK = ("prune --dry-run", "evaluate", "sweep --dry-run", "export --format packed")
_CONFIG = "model/config.json"
_INDEX = "model.safetensors.index.json"
_NAMED = ("--model", "config.json")

_BAD_VALUES: dict[str, Sequence[object]] = {
    "hidden_size": (0, -1, "32", 1.5, [32], None, 33, 64, 2**40, {}),
    "intermediate_size": (0, -48, "48", [], 47, 2**40, True),
    "num_hidden_layers": (0, -1, "3", 4, 3.5, [1], 10**9),
    "num_attention_heads": (0, -4, "4", [4], 3),
    "num_key_value_heads": (-2, "2", [2], 3),
    "vocab_size": (0, -1, "128", 64, 127, 2**40, [128]),
    "max_position_embeddings": (0, -1, "64", [], 1.5),
    "rms_norm_eps": ("small", [], {}),
    "hidden_act": ("nope", 3, [], "", "Silu"),
    "model_type": ("nope", 3, "", "clip", "t5", "distilbert", "whisper", ["llama"], None, "DELETE"),
    "dtype": ("float99", 7, "int8", "complex64", "", ["float32"], "bool"),
    "pad_token_id": (128, 10**6, "x", [5.5]),
    "attention_bias": ("x", True, []),
    "mlp_bias": (True, "x"),
    "tie_word_embeddings": ("x", [], 3),
    "rope_parameters": ("x", 3, {"rope_type": "nope", "rope_theta": 1e4}, {"rope_type": 3}),
    "quantization_config": ({"quant_method": "gptq", "bits": 4}, {"quant_method": "nope"}, "x"),
    "is_encoder_decoder": (True,),
    "head_dim": (0, -8, "8", 7, [8]),
}
"""Values of LLaMA's configuration that no model of these weights has. 2**40 cannot be allocated."""

_HARMLESS: dict[str, object] = {
    "an unknown key": ("comment", {"by": ["hand"]}),
    "a task that generation has": ("architectures", ["LlamaForCausalLM"]),
    "no dtype": ("dtype", None),
    "a pad token": ("pad_token_id", 5),
}


def cases() -> Iterator[Case]:
    """All of this file."""
    yield from _config_cases()
    yield from _index_cases()
    yield from _tokenizer_cases()


def _text(file: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> Sequence[str]:
        rewrite(folder / file, change)
        return []

    return damage


def _value(file: str, keys: tuple[str | int, ...], value: object) -> Damage:
    def damage(folder: Path) -> Sequence[str]:
        path = folder / file
        if value == "DELETE" and keys[-1] not in json.loads(path.read_text()):
            raise KeyError(keys)
        put(path, keys, value)
        return []

    return damage


def _config_cases() -> Iterator[Case]:
    for what, change in text_damages():
        damage = _text(_CONFIG, change)
        yield from each(_READS_CONFIG, reader="config.json", what=what, named=_NAMED, damage=damage)
    for key, values in _BAD_VALUES.items():
        for value in values:
            commands = ("prune", *_QUICK) if key != "max_position_embeddings" else ("prune", "evaluate")
            if key in ("model_type", "is_encoder_decoder", "quantization_config"):
                commands = _READS_CONFIG
            damage = _value(_CONFIG, (key,), value)
            yield from each(commands, reader="config.json", what=f"{key} {value!r}", named=_NAMED, damage=damage)
    for number, key in enumerate(("hidden_size", "num_hidden_layers", "vocab_size", "hidden_act", "model_type")):
        kind = str if key in ("hidden_act", "model_type") else int
        for value in wrong_types(kind, 12, number=number):
            damage = _value(_CONFIG, (key,), value)
            yield from each(
                ("prune --dry-run", "evaluate"), reader="config.json", what=f"{key} drawn {json.dumps(value)}",
                named=_NAMED, damage=damage,
            )  # fmt: skip
    for what, (key, value) in _HARMLESS.items():  # type: ignore[misc]
        damage = _value(_CONFIG, (key,), value)
        yield from each(_QUICK[:2], reader="config.json", what=what, named=(), damage=damage, harmless=True)


def _shard(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Make two shards and an index of the model's one file, and change the index."""
    tensors = tensors_of(folder)
    (folder / "model" / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-0000{1 + (place % 2)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: tensors[name] for name in names if files[name] == file}
        save_file(part, folder / "model" / file, metadata={"format": "pt"})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    path = folder / "model" / _INDEX
    path.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}))
    edit(path, change)


def _index_cases() -> Iterator[Case]:
    commands = ("prune", *_QUICK)
    first = "lm_head.weight"

    def sharded(change: Callable[[dict[str, Any]], object]) -> Damage:
        def damage(folder: Path) -> Sequence[str]:
            _shard(folder, change)
            return []

        return damage

    def text(change: Callable[[bytes], bytes]) -> Damage:
        def damage(folder: Path) -> Sequence[str]:
            _shard(folder, lambda _: None)
            rewrite(folder / "model" / _INDEX, change)
            return []

        return damage

    def entry(value: object) -> Callable[[dict[str, Any]], object]:
        return lambda index: index["weight_map"].__setitem__(first, value)

    for what, change in text_damages():
        yield from each(commands, reader="index", what=what, named=("--model", _INDEX), damage=text(change))
    values = ["", 3, None, ["x"], {}, True, ".", "..", "absent.safetensors", "../model", "/etc/passwd", "config.json"]
    values += ["a\0b", "x" * 300, "\ud800.safetensors", "../../../secret.safetensors", "x/" * 3000]
    changes: dict[str, Callable[[dict[str, Any]], object]] = {
        f"{first} in {str(value)[:30]!a}": entry(value) for value in values
    }
    for number, value in enumerate(wrong_types(dict, 8, number=77)):
        changes[f"weight_map drawn {number} {json.dumps(value)[:40]}"] = lambda index, value=value: index.update(  # type: ignore[misc]
            weight_map=value
        )
    changes |= {
        "no weight_map": lambda index: index.pop("weight_map"),
        "an empty weight_map": lambda index: index.update(weight_map={}),
    }
    swapped = "model-00002-of-00002.safetensors"
    changes["a file that lacks the tensor"] = lambda index: index["weight_map"].update(
        {name: swapped for name, file in index["weight_map"].items() if file != swapped}
    )
    for what, edited in changes.items():
        yield from each(commands, reader="index", what=what, named=("--model",), damage=sharded(edited))
    yield from each(_QUICK, reader="index", what="good", named=(), damage=sharded(lambda _: None), harmless=True)


def _tokenizer_cases() -> Iterator[Case]:
    commands, named = LOADS, ("--model", "tokenizer")
    for what, change in text_damages():
        damage = _text("model/tokenizer.json", change)
        yield from each(commands, reader="tokenizer.json", what=what, named=named, damage=damage)
        damage = _text("model/tokenizer_config.json", change)
        yield from each(
            ("prune --dry-run", "evaluate"), reader="tokenizer_config.json", what=what, named=named, damage=damage
        )
    values: dict[str, tuple[tuple[str | int, ...], Sequence[object]]] = {
        "model": (("model",), (None, "DELETE", [], {}, {"type": "Nope"}, "BPE", 3)),
        "vocab": (("model", "vocab"), (None, [], 3, {"a": "b"}, {"a": -1}, {"a": 2**70}, {"a": 1.5}, "DELETE")),
        "merges": (("model", "merges"), (None, {}, [3], [["a"]], ["a"], "a b", [["nope", "nope"]])),
        "pre_tokenizer": (("pre_tokenizer",), ({"type": "Nope"}, "x", 3, [])),
        "post_processor": (("post_processor",), ({"type": "Nope"}, "x", 3)),
        "added_tokens": (("added_tokens",), (3, "x", [3], [{"id": "x"}], [{}])),
    }
    for key, (keys, given) in values.items():
        for value in given:
            damage = _value("model/tokenizer.json", keys, value)
            yield from each(
                ("prune --dry-run", "evaluate"), reader="tokenizer.json", what=f"{key} {json.dumps(value)}",
                named=named, damage=damage,
            )  # fmt: skip
    for key, given in {
        "tokenizer_class": ("NopeTokenizer", 3, [], {}),
        "added_tokens_decoder": ("x", [3], {"0": 3}, {"x": {"content": "y"}}),
        "bos_token": ([], 3),
    }.items():
        for value in given:
            damage = _value("model/tokenizer_config.json", (key,), value)
            yield from each(
                ("prune --dry-run", "evaluate"), reader="tokenizer_config.json", what=f"{key} {json.dumps(value)}",
                named=named, damage=damage,
            )  # fmt: skip

    def without(folder: Path) -> Sequence[str]:
        for path in (folder / "model").glob("token*"):
            path.unlink()
        return []

    yield from each(commands, reader="tokenizer.json", what="no tokenizer at all", named=named, damage=without)
    for what, key, value in (
        ("the length that stands for none", "model_max_length", 1000000000000000019884624838656),
        ("an unknown key", "comment", {}),
    ):
        damage = _value("model/tokenizer_config.json", (key,), value)
        yield from each(LOADS[:3], reader="tokenizer_config.json", what=what, named=(), damage=damage, harmless=True)
