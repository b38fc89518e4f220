"""Greedy generation by transformers, one step at a time: as it is, compiled, with packed or with CSR linears."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from neuronal_ray.benchmark.runtimes import Opening
from neuronal_ray.core.kernels.build import library
from neuronal_ray.models.blocks import find_blocks
from neuronal_ray.models.checkpoint import load_model, open_checkpoint
from neuronal_ray.models.formats.packed_linear import pack_linears

Tokens = NDArray[np.int64]


class SparseLinear(nn.Module):
    """`nn.Linear` whose weight is a sparse CSR matrix of torch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to_sparse_csr())
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The product with the transposed weight, plus the bias."""
        outputs = (self.get_buffer("weight") @ inputs.reshape(-1, inputs.shape[-1]).T).T
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


class Generation:
    """A Session over a model of transformers."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool, length: int) -> None:
        self._model, self._length = model, length
        self._call: Callable[..., object] = torch.compile(model, dynamic=False) if compiled else model
        self._static = compiled
        self._cache: object = None
        self._seen = 0

    def prefill(self, tokens: Tokens) -> Tokens:
        """See Session."""
        self._cache = StaticCache(config=self._model.config, max_cache_len=self._length) if self._static else None
        self._seen = 0
        return self._step(tokens)

    def decode(self, tokens: Tokens) -> Tokens:
        """See Session."""
        return self._step(tokens[:, None])

    @torch.inference_mode()
    def _step(self, tokens: Tokens) -> Tokens:
        ids = torch.from_numpy(tokens).to(self._model.device)
        positions = torch.arange(self._seen, self._seen + ids.shape[1], device=ids.device)[None]
        found = self._call(ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = found.past_key_values  # type: ignore[attr-defined]
        self._seen += ids.shape[1]
        chosen: Tokens = found.logits[:, -1].argmax(dim=-1).cpu().numpy()  # type: ignore[attr-defined]
        return chosen


def open_session(opening: Opening) -> Generation:
    """A model in the dtype asked for, else its checkpoint's.

    Raises KernelUnavailable for packed linears where there is no kernel.
    """
    torch.set_num_threads(opening.threads)
    checkpoint = open_checkpoint(opening.path)
    dtype = checkpoint.config.get_text_config().dtype or torch.float32
    if opening.dtype is not None:
        dtype = getattr(torch, opening.dtype)
    model = load_model(checkpoint, device=torch.device(opening.device), dtype=dtype)
    if opening.runtime == "packed":
        library()
        pack_linears(model)
    if opening.runtime == "csr":
        _make_sparse(model)
    return Generation(model, compiled=opening.runtime == "compiled", length=opening.length)


def _make_sparse(model: PreTrainedModel) -> None:
    for block in find_blocks(model)[1]:
        for path, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                block.set_submodule(path, SparseLinear(module))
