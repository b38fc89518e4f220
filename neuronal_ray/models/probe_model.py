"""The model of a configuration with small random weights that take almost no memory, to observe what its blocks do.

A matrix is a view of one random vector, element [i, j] at i + j of it: as large as the sum of its sizes instead of
their product. A model of 7 B weights is made in under a second, and one of its blocks runs in about as long.
"""

import math

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel


def probe_model(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a model in float32 on the CPU; equal configurations give equal weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            values = nn.Parameter(_overlapping(parameter.shape, generator), requires_grad=False)
            values._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers leaves it as it is
            module.register_parameter(name, values)
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=persistent)
    model.tie_weights()
    model.initialize_weights()  # the buffers: frequencies of rotary embeddings, for example
    return model.eval().requires_grad_(False)


def _overlapping(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return a tensor of `shape`, of variance 1 / columns, whose elements share memory along its diagonals."""
    if len(shape) < 2:
        return torch.randn(shape, generator=generator) * 0.1
    vector: Tensor = torch.randn(sum(shape), generator=generator) / math.sqrt(shape[-1])
    return vector.as_strided(shape, (1,) * len(shape))
