"""Are two directories, or two files, of one and the same model?"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from neuronal_ray.models.tensor_files import Kind, Stored

_SAMPLED_BYTES = 4096
_NO_MATTER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def config_fingerprint(path: Path) -> str:
    """SHA-256 of the config.json in `path`, whatever the order of its keys, the dtype and who wrote it."""
    config = json.loads((path / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in _NO_MATTER}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def tensors_fingerprint(kinds: Iterable[Kind]) -> str:
    """SHA-256 of names, dtypes and shapes, in any order."""
    lines = sorted(json.dumps([kind.name, kind.dtype, list(kind.shape)]) for kind in kinds)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def weights_fingerprint(tensors: Mapping[str, Stored]) -> str:
    """SHA-256 of the first 4 KiB of every tensor: enough to tell two models apart, not to find an error."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        stored = tensors[name]
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            digest.update(name.encode() + b"\0" + file.read(min(stored.num_bytes, _SAMPLED_BYTES)))
    return digest.hexdigest()
