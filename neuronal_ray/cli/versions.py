"""The versions that numbers depend on: of this package down to its source files, of Python and of libraries."""

import hashlib
import platform
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from neuronal_ray import __version__

_PACKAGE = Path(__file__).parents[1]
_SCORING = ("core", "data", "models", "algorithms", "workers", "prune")
"""The packages whose code can change a candidate's score."""

_LIBRARIES = ("torch", "transformers", "datasets", "ray")


def versions() -> dict[str, str]:
    """Return the version of this package and those of Python and of the libraries that are installed, by name."""
    known = {"neuronal_ray": code_version(), "python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            known[library] = version(library)
    return known


def score_versions(*plug_ins: str) -> dict[str, str]:
    """Return the versions that scores of candidates depend on, by name; `plug_ins` as in `code_version`."""
    return {"neuronal_ray": code_version(*plug_ins), "torch": version("torch"), "transformers": version("transformers")}


def code_version(*plug_ins: str) -> str:
    """Return the release with a digest of the source files that can change a score, as in "0.1.0+0123456789ab".

    An edited checkout has another version than the release. So has a run with another or an edited file among
    `plug_ins`, names of plug-ins of which package.module or module:object come from outside this package.
    """
    sha = hashlib.sha256(source_digest(_PACKAGE).encode())
    for module in sorted({name.partition(":")[0] for name in plug_ins if "." in name or ":" in name}):
        spec = find_spec(module)
        assert spec is not None, module
        assert spec.origin is not None, module
        sha.update(Path(spec.origin).read_bytes())
    return f"{__version__}+{sha.hexdigest()[:12]}"


@cache
def source_digest(package: Path) -> str:
    """Return the SHA-256 of the Python and C files, by name and content, that can change a score."""
    sha = hashlib.sha256()
    for path in sorted(
        path for name in _SCORING for path in (package / name).rglob("*") if path.suffix in (".py", ".c")
    ):
        sha.update(f"{path.relative_to(package).as_posix()}\0{path.stat().st_size}\0".encode())
        sha.update(path.read_bytes())
    return sha.hexdigest()
