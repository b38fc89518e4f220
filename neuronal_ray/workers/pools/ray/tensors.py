"""How tensors cross Ray: their bytes outside the pickle, so that a reader maps them instead of copying them."""

import warnings

import numpy as np
import ray
import torch
from torch import Tensor

_Packed = tuple[str, tuple[int, ...], np.ndarray]


def send_bytes_of_tensors() -> None:
    """Send tensors by their bytes from now on in this process; they arrive on the host and must not be changed.

    Ray's own serializer copies a tensor both ways. The bits are the same, those of bfloat16 too.
    """
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
    ray.util.register_serializer(Tensor, serializer=_packed, deserializer=_unpacked)


def _packed(tensor: Tensor) -> _Packed:
    whole = tensor.detach().cpu().contiguous()
    name = str(whole.dtype).removeprefix("torch.")
    return name, tuple(whole.shape), whole.reshape(-1).view(torch.uint8).numpy()


def _unpacked(packed: _Packed) -> Tensor:
    name, shape, data = packed
    dtype: torch.dtype = getattr(torch, name)
    if not data.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data).view(dtype).reshape(shape)
