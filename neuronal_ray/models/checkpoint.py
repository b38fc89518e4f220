"""Checkpoints on disk: find, check and load one, and write its pruned copy. Safetensors only."""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, StrictDataclassError
from jaxtyping import Bool, Float
from torch import Tensor, nn
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

from neuronal_ray.core.layout import Layout, Linear, LinearSpec
from neuronal_ray.models.blocks import find_blocks, find_linears, is_transposed, weight_of
from neuronal_ray.models.experts import Expert, split_experts, stack_name
from neuronal_ray.models.unsupported import UnsupportedModel

_BUILTIN = Path(__file__).parent.parent / "builtin" / "model"
_WANTED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_UNWANTED = ["original/*", "*.bin", "*.pth", "*.msgpack", "*.h5", "*.gguf", "*.onnx"]
_INDEX = "model.safetensors.index.json"
_PART_BYTES = 4 * 2**30
_COPIED_BYTES = 2**24
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

    @property
    def num_bytes(self) -> int:
        """Size."""
        return self.stop - self.start


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
        return sum(stored.num_bytes for stored in self.tensors.values())

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
    index = path / _INDEX
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
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    blocks: range | None = None,
) -> PreTrainedModel:
    """The model in `dtype` on `device`, ready for inference.

    With `blocks` the others are there without parameters: nothing of theirs is read, they cannot run.
    Raises ValueError when weights are missing or have another shape than the configuration says.
    """
    kind, trust = AutoModelForCausalLM, {"trust_remote_code": trust_remote_code}
    if blocks is not None and len(blocks) < checkpoint.config.get_text_config().num_hidden_layers:
        kind, trust = _partial_class(checkpoint, blocks, trust_remote_code=trust_remote_code), {}
    with _quiet_loading():
        model, info = kind.from_pretrained(
            checkpoint.path,
            config=checkpoint.config,
            dtype=dtype,
            device_map={"": device},
            **trust,
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


def _partial_class(checkpoint: Checkpoint, blocks: range, *, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The class of the model, made so that blocks outside `blocks` have no parameters.

    transformers then finds nothing to load for them, whatever it renames, splits or joins for the others.
    """
    whole = type(empty_model(checkpoint, trust_remote_code=trust_remote_code))

    class Partial(whole):  # type: ignore[misc, valid-type]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            _, found = find_blocks(self)
            for index, block in enumerate(found):
                if index not in blocks:
                    _empty(block)

    Partial.__name__, Partial.__qualname__, Partial.__module__ = whole.__name__, whole.__qualname__, whole.__module__
    return Partial


def _empty(block: nn.Module) -> None:
    """Put modules without parameters in place of those with some; attributes of the block itself stay."""
    for name, child in list(block.named_children()):
        if any(True for _ in child.parameters()):
            setattr(block, name, nn.Module())
    for name, _ in list(block.named_parameters(recurse=False)):
        setattr(block, name, None)


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


def empty_llama(**config: int) -> PreTrainedModel:
    """A LLaMA without weights, for the shapes of models that are not at hand."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**config))


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


@dataclass(frozen=True, kw_only=True)
class Part:
    """One safetensors file of the result: its name, its tensors by stored name, and the blocks that it has."""

    file: str
    blocks: range
    names: tuple[str, ...]


def split_parts(
    checkpoint: Checkpoint, layout: Layout, shards: Sequence[range], *, trust_remote_code: bool = False
) -> list[Part]:
    """The files of the result: each within one shard, of a few GiB; the first also has what is in no linear."""
    model = empty_model(checkpoint, trust_remote_code=trust_remote_code)
    names = [_stored_names(checkpoint, model, specs) for specs in layout.blocks]
    runs: list[list[int]] = []
    for shard in shards:
        size = _PART_BYTES
        for block in shard:
            block_bytes = sum(checkpoint.tensors[name].num_bytes for name in names[block])
            if size + block_bytes > _PART_BYTES:
                runs.append([])
                size = 0
            runs[-1].append(block)
            size += block_bytes
    rest = set(checkpoint.tensors).difference(*names)
    parts = []
    for number, run in enumerate(runs, start=1):
        wanted = {name for block in run for name in names[block]} | (rest if number == 1 else set())
        parts.append(
            Part(
                file="model.safetensors" if len(runs) == 1 else f"model-{number:05}-of-{len(runs):05}.safetensors",
                blocks=range(run[0], run[-1] + 1),
                names=tuple(name for name in checkpoint.tensors if name in wanted),  # in their order on disk
            )
        )
    return parts


def _stored_names(checkpoint: Checkpoint, model: PreTrainedModel, specs: Sequence[LinearSpec]) -> set[str]:
    """The names under which the linears of one block are stored; `model` is an empty one."""
    blocks_name, blocks = find_blocks(model)
    values = {}
    for spec in specs:
        module = find_linears(blocks[spec.linear.block])[spec.linear.path]
        weight = weight_of(module)
        values[f"{blocks_name}.{spec.linear.block}.{spec.linear.path}.weight"] = (
            weight.t() if is_transposed(module) else weight
        )
    return {checkpoint.stored_name(name) for name in stored_tensors(model, values)}


def copy_part(checkpoint: Checkpoint, part: Part, target: Path) -> Checkpoint:
    """Write one file of a copy of the checkpoint into `target`; returns where its tensors lie there."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, begins = 0, {}
    for name in part.names:
        stored = checkpoint.tensors[name]
        header[name] = {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [offset, offset + stored.num_bytes],
        }
        begins[name] = offset
        offset += stored.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    data, path = 8 + len(encoded), target / part.file
    with ExitStack() as stack:
        sources = {file: stack.enter_context(file.open("rb")) for file in checkpoint.files}
        written = stack.enter_context(path.open("wb"))
        written.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in part.names:
            stored = checkpoint.tensors[name]
            source = sources[stored.path]
            source.seek(stored.start)
            left = stored.num_bytes
            while left:
                chunk = source.read(min(left, _COPIED_BYTES))
                written.write(chunk)
                left -= len(chunk)
    tensors = {}
    for name, begin in begins.items():
        stored = checkpoint.tensors[name]
        tensors[name] = replace(stored, path=path, start=data + begin, stop=data + begin + stored.num_bytes)
    return replace(checkpoint, path=target, tensors=tensors)


def copy_rest(checkpoint: Checkpoint, parts: Sequence[Part], target: Path) -> None:
    """Everything but the weights, once those are written: configuration, tokenizer and, last, the index of files."""
    for file in sorted(checkpoint.path.iterdir()):
        wanted = any(file.match(pattern) for pattern in _WANTED)
        if file.is_file() and wanted and file.suffix != ".safetensors" and file.name != _INDEX:
            shutil.copyfile(file, target / file.name)
    if len(parts) > 1:
        index = {
            "metadata": {"total_size": checkpoint.num_bytes},
            "weight_map": {name: part.file for part in parts for name in part.names},
        }
        temporary = target / f".{_INDEX}.partial"
        temporary.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        temporary.replace(target / _INDEX)


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


def zero_masked(written: Checkpoint, masks: Mapping[str, Bool[Tensor, "..."]]) -> dict[str, int]:
    """Zero the masked weights of a copy, in place, one tensor in memory at a time.

    `masks`, by stored name and in the stored shape, are True where weights go. Works on the bits of any dtype: what
    stays is unchanged. Returns the number of zeros of each tensor as saved (weights that were zero before included).
    """
    zeros = {}
    for name, mask in masks.items():
        with _bits(written, name, tuple(mask.shape)) as bits:
            bits[mask.cpu().numpy()] = 0
            zeros[name] = _count_zeros(bits)
    return zeros


def write_weights(written: Checkpoint, weights: Mapping[str, Float[Tensor, "..."]]) -> dict[str, int]:
    """Replace weights of a copy, in place, rounded to the stored dtype, one at a time.

    `weights` are by stored name and in the stored shape. Returns the number of zeros of each tensor as saved.
    Raises ValueError when a finite weight is too large for the stored dtype.
    """
    zeros = {}
    for name, weight in weights.items():
        dtype = written.tensors[written.stored_name(name)].dtype
        if dtype not in _DTYPES:
            raise UnsupportedModel(f"--model: {name} is stored as {dtype}, expected one of {', '.join(_DTYPES)}")
        rounded = weight.cpu().to(_DTYPES[dtype])
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"--model: new weights of {name} are not finite in the stored dtype {dtype}")
        with _bits(written, name, tuple(weight.shape)) as bits:
            bits[...] = rounded.contiguous().view(torch.uint8).numpy().view(bits.dtype)
            zeros[name] = _count_zeros(bits)
    return zeros


@contextmanager
def _bits(written: Checkpoint, name: str, shape: tuple[int, ...]) -> Iterator[np.memmap]:
    """The bits of one tensor of a copy, as unsigned integers of its shape; changes reach the file on exit."""
    stored = written.tensors[written.stored_name(name)]
    if shape != stored.shape:
        raise UnsupportedModel(f"--model: {name} is stored as {stored.shape}, the model has {shape}")
    item = _ITEM[stored.num_bytes // math.prod(shape)]
    bits = np.memmap(stored.path, item, "r+", offset=stored.start, shape=shape)
    yield bits
    bits.flush()


def _count_zeros(bits: np.memmap) -> int:
    """How many floating-point numbers are zero, of either sign."""
    all_but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    return bits.size - int(np.count_nonzero(bits & all_but_sign))
