"""Checkpoints on disk: find, check and load one, and write its pruned copy. Safetensors only."""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, StrictDataclassError
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from neuronal_ray.core.layout import Linear
from neuronal_ray.models.blocks import find_blocks, find_linears, weight_of
from neuronal_ray.models.experts import Expert, split_experts, stack_name
from neuronal_ray.models.unsupported import UnsupportedModel

_BUILTIN = Path(__file__).parent.parent / "builtin" / "model"
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_UNWANTED = ["original/*", "*.bin", "*.pth", "*.msgpack", "*.h5", "*.gguf", "*.onnx"]
_ITEM: dict[int, type[np.unsignedinteger]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies: file, byte range, shape and the name that safetensors has for its dtype."""

    path: Path
    start: int
    stop: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A directory in Hugging Face's layout whose safetensors files have been found complete."""

    path: Path
    config: PretrainedConfig
    tensors: dict[str, Stored]

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({stored.path for stored in self.tensors.values()})

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(stored.stop - stored.start for stored in self.tensors.values())

    def stored_name(self, name: str) -> str:
        """The checkpoint's name for the model's parameter `name`: the same, or with another prefix."""
        if name in self.tensors:
            return name
        found = [key for key in self.tensors if name.endswith("." + key) or key.endswith("." + name)]
        if len(found) != 1:
            raise UnsupportedModel(f"--model: {name} is stored under {len(found)} names in {self.path}")
        return found[0]


def resolve_model(model: str) -> Path:
    """The local directory of `model`: "builtin", a directory, or an id to fetch from the hub.

    Raises ValueError when there is no such directory and the hub does not give one.
    """
    if model == "builtin":
        return _BUILTIN
    if Path(model).is_dir():
        return Path(model).resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ValueError(f"--model: no directory {model}")
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--model: {model!r} is neither a directory nor on the hub ({reason})") from error


def open_checkpoint(path: Path, *, trust_remote_code: bool = False) -> Checkpoint:
    """Check what can be checked without reading weights.

    Raises ValueError for a missing or truncated file, UnsupportedModel for a kind that cannot be pruned.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"--model: no config.json in {path}, expected a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"--model: config.json in {path}: {str(error).strip().splitlines()[0]}") from error
    except StrictDataclassError as error:
        raise ValueError(f"--model: config.json in {path}: {' '.join(str(error).split())}") from error
    if config.is_encoder_decoder:
        raise UnsupportedModel("--model: encoder-decoder models are not supported, expected a decoder")
    if "quantization_config" in config.to_dict():
        raise UnsupportedModel("--model: the checkpoint is quantized; prune the original, quantize afterwards")
    tensors: dict[str, Stored] = {}
    for file in _safetensors_files(path):
        tensors |= _read_header(file)
    return Checkpoint(path=path, config=config, tensors=tensors)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--model: {index} is not the index of a sharded checkpoint") from error
    else:
        files = [path / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise ValueError(f"--model: {file} is missing; only safetensors checkpoints are read")
    return files


def _read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file. Raises ValueError when the file is shorter than its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"--model: {path} is truncated or not a safetensors file")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--model: {path} is not a safetensors file (unreadable header)") from error
    listed = max((stored.stop for stored in tensors.values()), default=8 + length)
    if listed != size:
        raise ValueError(f"--model: {path} is truncated or damaged: {size:,} bytes, its header lists {listed:,}")
    return tensors


def _stored(path: Path, data: int, entry: dict[str, list[int]]) -> Stored:
    """Where the tensor of one header entry lies in the file whose data begin at byte `data`."""
    start, stop = entry["data_offsets"]
    return Stored(
        path=path, start=data + start, stop=data + stop, shape=tuple(entry["shape"]), dtype=str(entry["dtype"])
    )


def load_model(
    checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in `dtype` on `device`, ready for inference.

    Raises ValueError when weights are missing or have another shape than the configuration says.
    """
    with _quiet_loading():
        model, info = AutoModelForCausalLM.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    absent = sorted(info["missing_keys"]) + sorted(
        f"{name} (has {list(stored)}, expected {list(expected)})" for name, stored, expected in info["mismatched_keys"]
    )
    if absent:
        raise ValueError(f"--model: {checkpoint.path} lacks weights of the model: {', '.join(absent[:3])}")
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No table of missing weights, which are refused here, and no bar per worker that drowns our own progress."""
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
    """The model without weights (on the meta device), for its shapes."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(checkpoint.config, trust_remote_code=trust_remote_code)
    split_experts(model, find_blocks(model)[1])
    return model


def linear_columns(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> dict[Linear, int]:
    """The number of inputs of every prunable linear, without reading a weight."""
    _, blocks = find_blocks(empty_model(checkpoint, trust_remote_code=trust_remote_code))
    return {
        Linear(index, path): weight_of(module).shape[1]
        for index, block in enumerate(blocks)
        for path, module in find_linears(block).items()
    }


def write_random_llama(path: Path, **config: int) -> None:
    """A LLaMA with random weights, in float32, for benchmarks."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**config)).save_pretrained(path)


@functools.lru_cache(maxsize=4)
def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer; ValueError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"--model: no tokenizer in {path}: {str(error).strip().splitlines()[0]}") from error


def load_encoder(path: Path, *, trust_remote_code: bool = False) -> Callable[[str], list[int]]:
    """Text to token ids by the checkpoint's tokenizer, with its own special tokens; read at the first text."""

    def encode(text: str) -> list[int]:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        tokens: list[int] = tokenizer(text, verbose=False).input_ids
        return tokens

    return encode


def copy_checkpoint(checkpoint: Checkpoint, target: Path) -> None:
    """Copy everything a model directory needs into `target`: configuration, tokenizer and weights, unchanged."""
    for file in sorted(checkpoint.path.iterdir()):
        wanted = any(file.match(pattern) for pattern in _WANTED)
        if file.is_file() and wanted and not (file.suffix == ".safetensors" and file not in checkpoint.files):
            shutil.copyfile(file, target / file.name)


def stored_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of linears (masks, weights) under the names and in the shapes in which checkpoints store them.

    `tensors`: by the name of the linear's weight in `model`, which was loaded from the checkpoint, and as the module
    keeps it. To be called with all linears of a block at once: experts are joined to the model's 3-D parameters, and
    what transformers split, joined or renamed at loading is undone.
    """
    whole: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, Expert):
            stacks.setdefault(stack_name(name, module), {})[module.index] = tensor
        else:
            whole[name] = tensor
    for name, experts in stacks.items():
        assert len(experts) == len(model.get_parameter(name)), f"{name} has other experts than {sorted(experts)}"
        whole[name] = torch.stack([experts[index] for index in range(len(experts))])
    stored: dict[str, Tensor] = revert_weight_conversion(model, whole)
    return stored


def zero_masked(checkpoint: Checkpoint, target: Path, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, int]:
    """Zero the masked weights of a checkpoint copied to `target`, in place, one tensor in memory at a time.

    `masks`, by stored name and in the stored shape, are True where weights go. Works on the bits of any dtype: what
    stays is unchanged. Returns the number of zeros of each tensor as saved (weights that were zero before included).
    """
    zeros = {}
    for name, mask in masks.items():
        with _bits(checkpoint, target, name, tuple(mask.shape)) as bits:
            bits[mask.cpu().numpy()] = 0
            zeros[name] = _count_zeros(bits)
    return zeros


def write_weights(checkpoint: Checkpoint, target: Path, weights: Mapping[str, Float[Tensor, "..."]]) -> dict[str, int]:
    """Replace weights of a checkpoint copied to `target`, in place, rounded to the stored dtype, one at a time.

    `weights` are by stored name and in the stored shape. Returns the number of zeros of each tensor as saved.
    Raises ValueError when a finite weight is too large for the stored dtype.
    """
    zeros = {}
    for name, weight in weights.items():
        dtype = checkpoint.tensors[checkpoint.stored_name(name)].dtype
        if dtype not in _DTYPES:
            raise UnsupportedModel(f"--model: {name} is stored as {dtype}, expected one of {', '.join(_DTYPES)}")
        rounded = weight.cpu().to(_DTYPES[dtype])
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"--model: new weights of {name} are not finite in the stored dtype {dtype}")
        with _bits(checkpoint, target, name, tuple(weight.shape)) as bits:
            bits[...] = rounded.contiguous().view(torch.uint8).numpy().view(bits.dtype)
            zeros[name] = _count_zeros(bits)
    return zeros


@contextmanager
def _bits(checkpoint: Checkpoint, target: Path, name: str, shape: tuple[int, ...]) -> Iterator[np.memmap]:
    """The bits of one tensor in the copy, as unsigned integers of its shape; changes reach the file on exit."""
    stored = checkpoint.tensors[checkpoint.stored_name(name)]
    if shape != stored.shape:
        raise UnsupportedModel(f"--model: {name} is stored as {stored.shape}, the model has {shape}")
    item = _ITEM[(stored.stop - stored.start) // math.prod(shape)]
    bits = np.memmap(target / stored.path.name, item, "r+", offset=stored.start, shape=shape)
    yield bits
    bits.flush()


def _count_zeros(bits: np.memmap) -> int:
    """How many floating-point numbers are zero, of either sign."""
    all_but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    return bits.size - int(np.count_nonzero(bits & all_but_sign))
