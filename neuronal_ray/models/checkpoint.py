"""Checkpoints on disk: finding, checking and loading them. Only safetensors files are read."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.cli.read_headers import Stored, read_header
from neuronal_ray.core.layout import Linear
from neuronal_ray.models.blocks import find_blocks, find_linears, refusals, weight_of
from neuronal_ray.models.config_flags import set_to_what_is_here
from neuronal_ray.models.hub import first_line
from neuronal_ray.models.routers import keep_routers_dense
from neuronal_ray.models.tensor_files import WORD_BYTES
from neuronal_ray.models.weight_files import find_weight_files

logger = logging.getLogger(__name__)

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes by their names in safetensors files."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A directory in Hugging Face's layout whose safetensors files are complete."""

    path: Path
    config: PretrainedConfig
    tensors: dict[str, Stored]
    index: Path | None = None
    """The index that lists the tensors' files; None for a single file."""

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({stored.path for stored in self.tensors.values()})

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.num_bytes for stored in self.tensors.values())

    def stored_name(self, name: str) -> str:
        """Return the checkpoint's name of the model's parameter `name`: the same, or with another prefix."""
        if name in self.tensors:
            return name
        names = [key for key in self.tensors if name.endswith("." + key) or key.endswith("." + name)]
        if len(names) != 1:
            raise UnsupportedModel(f"--model: {name} is stored under {len(names)} names in {self.path}")
        return names[0]


def open_checkpoint(path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Open a checkpoint and check its configuration and files without reading weights.

    Raises BadInput for a missing or truncated file, UnsupportedModel for a kind of model that cannot be pruned.
    """
    config = read_config(path, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise UnsupportedModel("--model: encoder-decoder models are not supported, expected a decoder")
    if "quantization_config" in config.to_dict():
        raise UnsupportedModel("--model: the checkpoint is quantized; prune the original, quantize afterwards")
    if "transformers_weights" in config.to_dict():
        raise UnsupportedModel(
            f"--model: config.json in {path} names its weights by transformers_weights; rename them to "
            "model.safetensors and take the key out"
        )
    files = find_weight_files(path)
    tensors: dict[str, Stored] = {}
    for file in files.paths:
        found = read_header(file).tensors
        if twice := sorted(found.keys() & tensors.keys()):
            raise BadInput(f"--model: {twice[0]!r:.80} is in {tensors[twice[0]].path} and in {file.name}")
        tensors |= found
    for name, stored in tensors.items():
        if _is_weight(name, stored) and stored.dtype not in WORD_BYTES:
            raise UnsupportedModel(
                f"--model: {name!r:.80} in {stored.path} is stored as {stored.dtype}, expected weights in one of "
                f"{', '.join(WORD_BYTES)}"
            )
    if (line := files.ignored_in_words()) is not None:
        _say_once(line)
    return Checkpoint(path=path, config=config, tensors=tensors, index=files.index)


def _is_weight(name: str, stored: Stored) -> bool:
    """Return whether a tensor is a matrix or a stack of them by which a module multiplies: masks may be integers."""
    last = name.rpartition(".")[2]
    return len(stored.shape) >= 2 and (last == "weight" or last.endswith("proj") or stored.dtype.startswith("F"))


@functools.cache
def _say_once(line: str) -> None:
    """Warn of files that are ignored: once in a process, however often a checkpoint is opened there."""
    logger.warning("--model: %s", line)


def read_config(path: Path, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration of the model in the directory `path`. Raises BadInput when it is missing or unreadable."""
    if not (path / "config.json").is_file():
        raise BadInput(f"--model: no config.json in {path}, expected a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        config.get_text_config()  # refused with several
    except (ValueError, OSError, KeyError) as error:
        raise BadInput(f"--model: config.json in {path}: {first_line(error)}") from error
    except StrictDataclassError as error:
        raise BadInput(f"--model: config.json in {path}: {' '.join(str(error).split())}") from error
    except TypeError as error:  # raised by transformers 5.10 and 5.17 for JSON other than an object
        raise BadInput(f"--model: config.json in {path} is no object with a model_type") from error
    set_to_what_is_here(config, path)
    return config


def load_model(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    blocks: range | None = None,
) -> PreTrainedModel:
    """Load the model in `dtype` on `device`, ready for inference.

    With `blocks` the other blocks have no parameters: their weights are not read and they cannot run.
    Raises BadInput when weights are missing or have another shape than the configuration says.
    """
    kind, trust = AutoModelForCausalLM, {"trust_remote_code": trust_remote_code}
    if blocks is not None and len(blocks) < checkpoint.config.get_text_config().num_hidden_layers:
        kind, trust = _partial_class(checkpoint, blocks, trust_remote_code=trust_remote_code), {}
    with refusals(), quiet_loading():
        model, info = kind.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            dtype=dtype,
            device_map={"": device},
            **trust,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    refuse_absent(info, checkpoint.path)
    return model.eval().requires_grad_(False)


def refuse_absent(info: Mapping[str, Iterable[Any]], path: Path, *, flag: str = "--model") -> None:
    """Raise BadInput when transformers' loading `info` names weights that `path` lacks."""
    absent = sorted(info["missing_keys"]) + sorted(
        f"{name} (has {list(stored)}, expected {list(expected)})" for name, stored, expected in info["mismatched_keys"]
    )
    if absent:
        raise BadInput(f"{flag}: {path} lacks weights of the model: {', '.join(absent[:3])}")


def _partial_class(checkpoint: Checkpoint, blocks: range, *, trust_remote_code: bool) -> type[PreTrainedModel]:
    """Return a subclass of the model's class in which blocks outside `blocks` have no parameters.

    transformers then loads nothing for them, and still renames, splits and joins tensors for the other blocks.
    """
    whole = type(empty_model(checkpoint, trust_remote_code=trust_remote_code))

    class Partial(whole):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            _, all_blocks = find_blocks(self)
            for index, block in enumerate(all_blocks):
                if index not in blocks:
                    _empty(block)

    Partial.__name__, Partial.__qualname__, Partial.__module__ = whole.__name__, whole.__qualname__, whole.__module__
    return Partial


def _empty(block: nn.Module) -> None:
    """Replace children that have parameters by empty modules; the block's other attributes stay."""
    for name, child in list(block.named_children()):
        if any(True for _ in child.parameters()):
            setattr(block, name, nn.Module())
    for name, _ in list(block.named_parameters(recurse=False)):
        setattr(block, name, None)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' table of missing weights, which are refused here, and its progress bar per worker."""
    verbosity, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bar:
            transformers_logging.enable_progress_bar()


def empty_model(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model without weights (on the meta device), for its shapes."""
    with refusals(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=trust_remote_code)
    keep_routers_dense(model, trust_remote_code=trust_remote_code)
    return model


def linear_columns(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> dict[Linear, int]:
    """Return the number of inputs of every prunable linear, without reading a weight."""
    _, blocks = find_blocks(empty_model(checkpoint, trust_remote_code=trust_remote_code))
    return {
        Linear(index, path): weight_of(module).shape[1]
        for index, block in enumerate(blocks)
        for path, module in find_linears(block).items()
    }


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the checkpoint's tokenizer. Raises BadInput if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise BadInput(f"--model: no tokenizer in {path}: {first_line(error)}") from error
