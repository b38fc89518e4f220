"""Greedy generation by transformers, one step at a time: eager or compiled, with dense, packed or CSR linears."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache

from neuronal_ray.models.blocks import find_blocks

Tokens = NDArray[np.int64]


class SparseLinear(nn.Module):
    """`nn.Linear` whose weight is a sparse CSR matrix of torch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach().to_sparse_csr())
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """Multiply by the transposed weight and add the bias."""
        outputs = (self.get_buffer("weight") @ inputs.reshape(-1, inputs.shape[-1]).T).T
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.reshape(*inputs.shape[:-1], -1)


def sparsify_linears(model: PreTrainedModel) -> None:
    """Replace every nn.Linear of the blocks by a SparseLinear."""
    for block in find_blocks(model)[1]:
        for path, module in list(block.named_modules()):
            if type(module) is nn.Linear:
                block.set_submodule(path, SparseLinear(module))


class Generation:
    """A model and the key/value cache of the sequences in progress, of at most `length` tokens each."""

    def __init__(self, model: PreTrainedModel, *, compiled: bool, length: int) -> None:
        self._model, self._length = model, length
        self._call: Callable[..., object] = torch.compile(model, dynamic=False) if compiled else model
        self._static = compiled
        self._cache: object = None
        self._seen = 0

    def prefill(self, tokens: Tokens) -> Tokens:
        """Clear the cache and read `tokens` [sequences, length]; return the most likely next tokens [sequences]."""
        self._cache = StaticCache(config=self._model.config, max_cache_len=self._length) if self._static else None
        self._seen = 0
        return self._step(tokens)

    def decode(self, tokens: Tokens) -> Tokens:
        """Read one more token of each sequence [sequences]; return the most likely next tokens [sequences]."""
        return self._step(tokens[:, None])

    @torch.inference_mode()
    def _step(self, tokens: Tokens) -> Tokens:
        ids = torch.from_numpy(tokens).to(self._model.device)
        positions = torch.arange(self._seen, self._seen + ids.shape[1], device=ids.device)[None]
        output = self._call(ids, position_ids=positions, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values  # type: ignore[attr-defined]
        self._seen += ids.shape[1]
        chosen: Tokens = output.logits[:, -1].argmax(dim=-1).cpu().numpy()  # type: ignore[attr-defined]
        return chosen
