"""Which files beside the weights belong to a model: one rule, for what is downloaded, copied into results and exported.

They are what transformers, vLLM or a person reads: configurations, tokenizer, processor, chat templates, code, license
and model card. Records of runs, states of trainings and what describes other weights stay behind.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub import constants

from neuronal_ray.models.weight_files import is_weight_file

logger = logging.getLogger(__name__)

_READ = (
    *("*config*.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "*.jinja"),
    *("chat_template*", "tokenizer*", "*tokenizer.json", "*.tokenizer", "tekken.json", "normalizer.json", "emoji.json"),
    *("*vocab*", "merges*", "*.model", "*.model.v*", "*.tiktoken", "*.spm", "*.bpe", "*.codes", "dict.txt"),
    *("word_*.json", "byte_maps.json"),
)
"""Configurations and files of tokenizers and processors: a link is read, wherever it leads."""

_LEGAL = ("license*", "licence*", "*license.*", "notice*", "copying*", "copyright*", "patents*", "*policy*", "authors*")
_ANYWHERE = (*_READ, *_LEGAL, "*.py", "requirements*.txt")
_AT_THE_TOP = (*_ANYWHERE, "*.json", "*.txt", "*.md", "readme*")
_STALE = (
    "pruning.json",  # of an earlier run
    *("adapter_*", "quant*_config*.json", "hf_quant_config.json"),  # of weights that are not copied
    *("trainer_state.json", "*_results.json"),  # of a training
)
_NATIVE, _NATIVE_WEIGHTS = "params.json", "consolidated*"  # Mistral's own format; vLLM takes it for the whole model
_TEMPLATES = "additional_chat_templates"
_SHOWN = 4


def companions(names: Iterable[str]) -> list[str]:
    """Return those of a directory's files, as paths within it with slashes, that belong to the model; not its weights.

    A subfolder with weights is another model, or the same one in another format: none of its files belongs to it.
    """
    names = sorted(names)
    formats = {PurePosixPath(name).parts[0] for name in names if "/" in name and is_weight_file(name)}
    native = any(fnmatchcase(name, _NATIVE_WEIGHTS) for name in names)
    return [
        name
        for name in names
        if PurePosixPath(name).parts[0] not in formats
        and _belongs(PurePosixPath(name))
        and not (native and name == _NATIVE)
    ]


def _belongs(name: PurePosixPath) -> bool:
    if is_weight_file(name.name) or any(map(_is_hidden, name.parts)):
        return False
    patterns = _AT_THE_TOP if len(name.parts) == 1 else _ANYWHERE
    return _matches(name.name, patterns) and not _matches(name.name, _STALE)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that belong to the model in the directory `source`; one warning names those that cannot be.

    Weights, configurations and tokenizers are read through links. Other files that are links to outside of `source`
    and of the hub's cache are not copied: they may be anything.
    """
    roots = _roots(source)
    found = list(_walk(source, ""))
    left = {name: "a link to a directory" for name in found if (source / name).is_dir()}
    for name in companions(name for name in found if name not in left):
        if (reason := _reason(source / name, roots)) is not None:
            left[name] = reason
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    if left:
        shown = ", ".join(f"{name!r:.80} ({reason})" for name, reason in list(left.items())[:_SHOWN])
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        logger.warning("--model: not copied from %s: %s%s", source, shown, more)


def _walk(source: Path, folder: str) -> Iterator[str]:
    """Yield the files below a folder of `source`, as paths within it.

    Linked directories are yielded and not entered, but for additional chat templates. Hidden ones are left out.
    """
    with os.scandir(source / folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            name = f"{folder}{entry.name}"
            if _is_hidden(entry.name):
                continue
            if entry.is_dir(follow_symlinks=name == _TEMPLATES):
                yield from _walk(source, f"{name}/")
            else:
                yield name


def _roots(source: Path) -> list[str]:
    """Return where links may lead: into the directory, the hub's cache, or the cache that the directory is in."""
    roots = [source, Path(constants.HF_HUB_CACHE)]
    if (snapshots := source.parent).name == "snapshots":
        roots.append(snapshots.parent)
    return [os.path.realpath(root) for root in roots]


def _reason(file: Path, roots: list[str]) -> str | None:
    """Return why a file is not copied; None when it is."""
    if not file.is_file():
        return "a link to nothing" if file.is_symlink() else "no regular file"
    if not os.access(file, os.R_OK):
        return "permission denied"
    if _matches(file.name, _READ):
        return None
    real = os.path.realpath(file)
    inside = any(os.path.commonpath([real, root]) == root for root in roots)
    return None if inside else "a link to outside of it"
