"""What a model's shapes tell, without its weights, about whether it can be pruned."""

from contextlib import suppress

import torch
from transformers import PreTrainedModel

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.models.blocks import find_blocks, find_linears
from neuronal_ray.models.experts import experts_of

_TOKENS = 8


def check_shapes(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for what a run would refuse once weights are loaded: tied linears, experts in one product.

    `model` is on the meta device, its experts split.
    """
    _, blocks = find_blocks(model)
    weights = [id(linear.weight) for block in blocks for linear in find_linears(block).values()]
    if len(set(weights)) != len(weights):
        raise UnsupportedModel("--model: two blocks share the weights of a linear (tied)")
    for module in blocks.modules():
        experts = list(experts_of(module).values())
        for width in {size for expert in experts[:1] for size in expert.weight.shape}:
            # Experts that take hidden states alone compute all in one product; the others want to be told which.
            with suppress(TypeError, RuntimeError):
                module(torch.zeros(len(experts) * _TOKENS, width, device="meta"))
