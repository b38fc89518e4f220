"""From --model to a directory: a local one, the built-in model, or an ID on the Hugging Face hub."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_files import is_directory, is_file
from neuronal_ray.models.companion_files import companions
from neuronal_ray.models.weight_files import INDEX, SINGLE, index_entries, only_safetensors

_BUILTIN = Path(__file__).parents[1] / "data" / "builtin" / "model"
_PAGE = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/tree/([^?#]+?))?/?(?:[?#].*)?")
_REVISION = re.compile(r"\w[\w.+@=-]*(/\w[\w.+@=-]*)*")
_NO_MODELS = ("datasets", "spaces", "papers", "blog", "docs", "collections")


def resolve_model(model: str, revision: str | None = None) -> Path:
    """Return the local directory of `model`: "builtin", a directory, an ID on the hub or the address of its page.

    `revision` is a branch, a tag or a commit of a model on the hub. Raises BadInput when there is no such directory and
    the hub does not provide one.
    """
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BadInput(f"--revision: {revision!r:.80} is no branch, tag or commit")
    if "://" in model:
        return _downloaded(*_of_page(model, revision))
    path = Path(model)
    if model == "builtin" or is_directory(path, flag="--model") or model.startswith("~"):
        if revision is not None:
            raise BadInput(f"--revision: {revision!r:.80} is for models of the hub, and {model} is a directory here")
        return _BUILTIN if model == "builtin" else _local(path)
    if is_file(path, flag="--model") or path.suffix in (".gguf", ".safetensors", ".bin"):
        raise BadInput(f"--model: {_file_in_words(path)}")
    if model.startswith((".", "/")) or model.count("/") > 1:
        raise BadInput(f"--model: no directory {model}")
    return _downloaded(model, revision)


def commit_of(path: Path) -> str | None:
    """Return the commit of a model's directory in a cache of the hub; None for any other directory."""
    return path.name if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--") else None


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _local(path: Path) -> Path:
    try:
        local = path.expanduser()
    except RuntimeError as error:
        raise BadInput(f"--model: no directory {path}: there is no such user") from error
    if not is_directory(local, flag="--model"):
        raise BadInput(f"--model: no directory {path}")
    if not os.access(local, os.R_OK | os.X_OK):
        raise BadInput(f"--model: cannot read {path}: Permission denied")
    return local.resolve()


def _file_in_words(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which is not read; expected a directory or an ID with safetensors files"
    what = "is a file" if is_file(path, flag="--model") else "does not exist"
    return f"{path} {what}, expected a directory with config.json and safetensors files, or an ID on the hub"


def _of_page(address: str, revision: str | None) -> tuple[str, str | None]:
    """Return the ID and the revision of the model whose page on the hub has this address."""
    page = _PAGE.fullmatch(address)
    if page is None or page[1].split("/")[0] in _NO_MODELS:
        raise BadInput(
            f"--model: {address!r:.120} is not the address of a model on the hub, expected its ID such as owner/name"
        )
    if None not in (page[2], revision) and page[2] != revision:
        raise BadInput(f"--revision: {revision!r:.80} is another one than in the address of --model, {page[2]!r:.80}")
    return page[1], revision or page[2]


def _downloaded(model: str, revision: str | None) -> Path:
    """Download what is used of a model on the hub, unless it is cached: one copy of the weights, and its companions."""
    at = "" if revision is None else f" at revision {revision!r:.80}"
    with hub_refusals(f"--model: {model!r}{at}", page=f"{constants.ENDPOINT}/{model}"):
        path = Path(snapshot_download(model, revision=revision, allow_patterns=["config.json"]))
        names = _listed(model, path.name)
        if names is None:
            return path  # of the cache, whole or not: checked when it is opened
        if SINGLE not in names and INDEX not in names:
            raise BadInput(f"--model: {model!r}{at}: {only_safetensors(names, model)}")
        wanted = [*companions(names), SINGLE if SINGLE in names else INDEX]
        snapshot_download(model, revision=path.name, allow_patterns=_exactly(wanted))
        if SINGLE not in names:
            listed = index_entries(path / INDEX, flag="--model")
            snapshot_download(model, revision=path.name, allow_patterns=_exactly(listed))
        return path


def _listed(model: str, commit: str) -> list[str] | None:
    """Return the names of a model's files on the hub; None when the hub cannot be asked."""
    try:
        return list(HfApi().list_repo_files(model, revision=commit))
    except (HTTPError, OfflineModeIsEnabled):
        return None


def _exactly(names: Iterable[str]) -> list[str]:
    """Return patterns that only these names match."""
    return [glob.escape(name) for name in names]


@contextmanager
def hub_refusals(what: str, *, page: str) -> Iterator[None]:
    """Turn an error of the hub into a BadInput that begins with `what`, says the cause and what to do next."""
    try:
        yield
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(f"{what}{_cause(error, page)}") from error


def _cause(error: Exception, page: str) -> str:
    """Return the cause of an error of the hub, as the end of a sentence, and the next step."""
    if isinstance(error, HFValidationError):
        return f" is neither a directory nor on the hub: it is no ID ({first_line(error)})"
    root = _root(error)
    status = root.response.status_code if isinstance(root, HfHubHTTPError) else None
    if isinstance(root, GatedRepoError):
        if status == 401 and get_token() is None:
            return f" is gated and no token was sent; accept its terms at {page}, then run `hf auth login`"
        return f" is gated and this account has no access: accept its terms at {page}, or log in as who has"
    if isinstance(root, DisabledRepoError):
        return f" is disabled on the hub; see {page}"
    if status == 401 and get_token() is not None:
        return " cannot be read: the hub refuses the token (expired, or mistyped); run `hf auth login` with a new one"
    if isinstance(root, RevisionNotFoundError):
        return f" is no branch, tag or commit of it (--revision); see {page}/tree/main"
    if isinstance(root, RepositoryNotFoundError):
        hidden = "" if get_token() else ", or it is private and no token was sent (run `hf auth login`)"
        return f" is neither a directory nor on the hub: {page} does not exist{hidden}"
    if status is not None:
        if status == 429 or status >= 500:
            return f" cannot be downloaded now: the hub answers {status}; retry later, or give a local directory"
        return f" cannot be read: the hub answers {status} ({first_line(root)})"
    return _unreachable(error, root)


def _unreachable(error: Exception, root: BaseException) -> str:
    """Return what to do when the hub gave no answer, as the end of a sentence."""
    if constants.HF_HUB_OFFLINE or isinstance(root, OfflineModeIsEnabled):
        return (
            " is neither a directory nor on the hub's copy here (the cache), and HF_HUB_OFFLINE forbids to download; "
            "unset it, or give a local directory"
        )
    if isinstance(error, LocalEntryNotFoundError | HTTPError):
        return f" is not cached, and {constants.ENDPOINT} cannot be reached; retry later, or give a local directory"
    return f" cannot be downloaded: {first_line(error)}"


def _root(error: BaseException) -> BaseException:
    """Return the answer of the hub, or the failure of the connection, that an error of snapshot_download comes from."""
    while not isinstance(error, HfHubHTTPError | OfflineModeIsEnabled) and error.__cause__ is not None:
        error = error.__cause__
    return error
