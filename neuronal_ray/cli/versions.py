"""The versions that numbers depend on: of this package down to its source files, of Python and of libraries."""

import hashlib
import platform
from collections.abc import Sequence
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


def versions(*plug_ins: str) -> dict[str, str]:
    """Return the versions of this package with its `plug_ins`, of Python and of the libraries installed, by name."""
    known = {"neuronal_ray": code_version(*plug_ins), "python": platform.python_version()}
    for library in _LIBRARIES:
        with suppress(PackageNotFoundError):
            known[library] = version(library)
    return known


def score_versions(*plug_ins: str) -> dict[str, str]:
    """Return the versions that scores of candidates depend on, by name; `plug_ins` as in `code_version`."""
    return {"neuronal_ray": code_version(*plug_ins), "torch": version("torch"), "transformers": version("transformers")}


def code_version(*plug_ins: str) -> str:
    """Return the release with a digest of the source files that can change a score, as in "0.1.0+0123456789ab".

    An edited checkout has another version than the release. So has a run with another name among `plug_ins` that comes
    from outside this package, or with an edited file in that plug-in's top-level package or module.
    """
    sha = hashlib.sha256(source_digest(_PACKAGE).encode())
    outside = sorted({name for name in plug_ins if "." in name or ":" in name})
    for name in outside:
        sha.update(f"{name}\0".encode())
    for top in sorted({name.partition(":")[0].partition(".")[0] for name in outside}):
        spec = find_spec(top)
        assert spec is not None, top
        if spec.submodule_search_locations is not None:
            for folder in spec.submodule_search_locations:
                _add_files(sha, Path(folder), sorted(Path(folder).rglob("*")))
        elif spec.origin is not None:
            _add_files(sha, Path(spec.origin).parent, [Path(spec.origin)])
    return f"{__version__}+{sha.hexdigest()[:12]}"


@cache
def source_digest(package: Path) -> str:
    """Return the SHA-256 of the Python and C files, by name and content, that can change a score."""
    sha = hashlib.sha256()
    _add_files(sha, package, sorted(path for name in _SCORING for path in (package / name).rglob("*")))
    return sha.hexdigest()


def _add_files(sha: "hashlib._Hash", folder: Path, paths: Sequence[Path]) -> None:
    """Add the code among `paths` to a digest, by name and content."""
    for path in paths:
        if path.suffix in (".py", ".c", ".so"):
            sha.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
            sha.update(path.read_bytes())
