"""Linears that stay dense, observed by running a block: routers, gates of shared experts, and what is never called.

Routers have few weights, and one weight less sends tokens to other experts. Of a linear that is not called, because
no text passes through it or because the model takes its weight alone, no inputs can be seen.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neuronal_ray.models.blocks import Recording, Stream, find_blocks, find_linears, keep_dense, weight_of
from neuronal_ray.models.experts import is_vector, split_experts
from neuronal_ray.models.probe_model import probe_model
from neuronal_ray.models.routing import find_places

logger = logging.getLogger(__name__)

SELECTS = "selects or weighs experts"
NO_PRODUCT = "returns more than a product, as routers do"
NOT_CALLED = "is not called as a module while text passes"

_PARALLEL = 0.999  # vectors with a larger cosine are multiples of one another
_SEQUENCES, _TOKENS = 16, 6

_known: dict[str, list[dict[str, str]]] = {}
"""The routers of each block, by the configuration of the model."""


def keep_routers_dense(model: PreTrainedModel, *, trust_remote_code: bool = False) -> None:
    """Mark the routers in the blocks of `model`, so that `find_linears` leaves them out.

    They are found in a model of the same configuration with random weights, so that every process finds the same,
    whether it holds the weights or not. Each kind of block is observed once. Blocks without weights are passed over.
    """
    _, blocks = find_blocks(model)
    split_experts(model, blocks)
    present = [block for block in blocks if any(True for _ in block.parameters())]
    if all(_is_plain(block) for block in present):
        return
    key = model.config.to_json_string()
    if key not in _known:
        _known[key] = _observe(model.config, trust_remote_code=trust_remote_code)
    for block, routers in zip(blocks, _known[key], strict=True):
        modules = dict(block.named_modules())
        for path in routers.keys() & modules.keys():
            keep_dense(modules[path])


def _observe(config: PretrainedConfig, *, trust_remote_code: bool) -> list[dict[str, str]]:
    """Return the routers of each block."""
    stream = Stream(probe_model(config, trust_remote_code=trust_remote_code))
    vocabulary: int = stream.model.get_input_embeddings().weight.shape[0]
    recording = stream.start(torch.arange(_SEQUENCES * _TOKENS).reshape(_SEQUENCES, _TOKENS) % vocabulary)
    kinds: dict[tuple[object, ...], dict[str, str]] = {}
    routers = []
    for index, block in enumerate(stream.blocks):
        shapes = tuple((path, weight_of(module).shape) for path, module in find_linears(block).items())
        kind = type(block).__qualname__, shapes
        if kind not in kinds:
            kinds[kind] = find_routers(stream, index, recording)
            for path, reason in kinds[kind].items():
                logger.warning("%s: %s; it is not pruned (block %d and others of its kind)", path, reason, index)
        routers.append(kinds[kind])
    return routers


def _is_plain(block: nn.Module) -> bool:
    """Return whether a block consists of plain linears and vectors, none of them in a list of experts."""
    linears = find_linears(block)
    plain = {
        id(module.weight) for module in linears.values() if type(module).forward in (nn.Linear.forward, Conv1D.forward)
    }
    others = [parameter for parameter in block.parameters() if id(parameter) not in plain]
    return all(is_vector(parameter) for parameter in others) and not find_places(block, linears)


def find_routers(stream: Stream, index: int, recording: Recording) -> dict[str, str]:
    """Return the linears of block `index` that stay dense, by path, each with the reason.

    A linear outside the experts that is never called stays dense. It is a router if disturbing its output gives experts
    other tokens, or multiples of the same tokens; or if its output reaches no linear of the block and has one row, or
    as many rows as there are experts.
    """
    linears = find_linears(stream.blocks[index])
    routers: dict[str, str] = {}
    baseline = _inputs(stream, index, recording, linears, routers=routers)
    places = find_places(stream.blocks[index], linears)
    routers |= dict.fromkeys(linears.keys() - baseline.keys() - places.keys(), NOT_CALLED)
    counts = Counter(place.experts for place in places.values() if place.inside == next(iter(places.values())).inside)
    for path in baseline.keys() - places.keys() - routers.keys():
        disturbed = _inputs(stream, index, recording, linears, disturbed=path)
        reader = next((other for other in baseline if _differ(baseline[other], disturbed.get(other))), None)
        rows = len(weight_of(linears[path]))
        if reader is None:
            routes = bool(places) and rows in (1, *counts.values())
        else:
            list_of = places[reader].experts if reader in places else None
            fed = [baseline[other] for other, place in places.items() if other in baseline and place.experts == list_of]
            routes = list_of is not None and _multiples(disturbed.get(reader), fed)
        if routes:
            routers[path] = SELECTS
    return routers


@torch.no_grad()
def _inputs(
    stream: Stream,
    index: int,
    recording: Recording,
    linears: Mapping[str, nn.Module],
    *,
    disturbed: str | None = None,
    routers: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Run the block and return the inputs of its linears in order of execution, [..., columns].

    The output of `disturbed` is changed; linears that return no tensor are added to `routers`.
    """
    inputs: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[..., object]:
        def note(_: nn.Module, args: tuple[Tensor, ...], output: object) -> object:
            inputs[path] = args[0].clone()
            if not isinstance(output, Tensor):
                if routers is not None:
                    routers[path] = NO_PRODUCT
            elif path == disturbed:
                generator = torch.Generator().manual_seed(0)
                return output + output.std() * torch.randn(output.shape, generator=generator)
            return None

        return note

    handles = [module.register_forward_hook(watch(path)) for path, module in linears.items()]
    try:
        stream.block(index, recording)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _differ(before: Tensor, after: Tensor | None) -> bool:
    return after is None or not torch.equal(before, after)


def _multiples(after: Tensor | None, before: list[Tensor]) -> bool:
    """Return whether each row of `after` is a multiple of a row of `before`; None for no rows."""
    if after is None or after.numel() == 0:
        return True
    wide = [inputs.flatten(0, -2) for inputs in before if inputs.shape[-1] == after.shape[-1]]
    known = nn.functional.normalize(torch.cat(wide), dim=-1)
    rows = nn.functional.normalize(after.flatten(0, -2), dim=-1)
    largest = (rows @ known.T).abs().amax(dim=1)  # [tokens]
    return bool(((largest > _PARALLEL) | (rows == 0).all(dim=1)).all())
