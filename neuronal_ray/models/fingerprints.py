"""Fingerprints of configurations, tensors and weights, to recognize files of the same model."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from neuronal_ray.cli.read_headers import Kind, Stored

_SAMPLED_BYTES = 4096
_IGNORED_KEYS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def config_fingerprint(path: Path) -> str:
    """Return the SHA-256 of config.json in `path`, whatever its dtype, its writer and the order of its keys."""
    config = read_raw_config(path)
    kept = {key: value for key, value in config.items() if key not in _IGNORED_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_raw_config(path: Path) -> dict[str, object]:
    """Return config.json in `path` as it is written; transformers has read it, which takes `Infinity` for a number."""
    config: dict[str, object] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return config


def tensors_fingerprint(kinds: Iterable[Kind]) -> str:
    """Return the SHA-256 of names, dtypes and shapes, whatever their order."""
    lines = sorted(json.dumps([kind.name, kind.dtype, list(kind.shape)]) for kind in kinds)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_fingerprint(tensors: Mapping[str, Stored]) -> str:
    """Return the SHA-256 of the first 4 KiB of every tensor: it distinguishes models, but does not detect damage."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            digest.update(name.encode() + b"\0" + file.read(min(stored.num_bytes, _SAMPLED_BYTES)))
    return digest.hexdigest()
