"""Loading a packed directory as a transformers model."""

from pathlib import Path
from types import EllipsisType

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.read_headers import Stored
from neuronal_ray.core.packing import unpack_words
from neuronal_ray.models.checkpoint import DTYPES, quiet_loading, refuse_absent
from neuronal_ray.models.formats.packed_files import READER, PackedTensor, open_packed
from neuronal_ray.models.tensor_files import WORD_BYTES, checksum, read_bytes

_AHEAD = 2**26
"""Bytes that the system prefetches while a tensor is unpacked."""


class _LazyTensor:
    """A tensor that is read and unpacked when transformers evaluates `tensor[...]`."""

    def __init__(self, name: str, packed: PackedTensor) -> None:
        self._name, self._packed = name, packed

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored tensor."""
        return DTYPES[self._packed.values.dtype]

    def is_floating_point(self) -> bool:
        """Return what `Tensor.is_floating_point` returns."""
        return self.dtype.is_floating_point

    def __getitem__(self, everything: EllipsisType) -> Tensor:
        packed = self._packed
        values = self._read("values", packed.values)
        if packed.bits is not None:
            word = f"u{WORD_BYTES[packed.values.dtype]}"
            values = unpack_words(self._read("bits", packed.bits), values.view(word), packed.size).view(np.uint8)
        return torch.from_numpy(values).view(self.dtype).view(packed.shape)

    def _read(self, component: str, stored: Stored) -> np.ndarray:
        data = read_bytes(stored, ahead=_AHEAD)
        if checksum(data) != self._packed.checksums[component]:
            raise BadInput(f"{READER}: {stored.path} is damaged: {component} of {self._name} have another checksum")
        return data


def load_packed(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a packed directory, bit for bit as `AutoModelForCausalLM.from_pretrained` loads the dense one.

    Tensors are unpacked one by one on their way to `device`; `dtype` is that of from_pretrained. Raises BadInput for
    damaged or incomplete files and for files of another model.
    """
    packed = open_packed(Path(path), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(packed.config, trust_remote_code=trust_remote_code))
    with quiet_loading():
        model, info = kind.from_pretrained(
            None,
            config=packed.config,
            state_dict={name: _LazyTensor(name, tensor) for name, tensor in packed.tensors.items()},
            dtype=dtype,
            device_map={"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    refuse_absent(info, packed.path, flag=READER)
    model.config.name_or_path = str(path)
    if (packed.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(packed.path)
    return model
