"""The layout of a model, measured by running its blocks: no table of families, no guess from names.

Each distinct kind of block is traced once (see block_wiring); blocks whose linears have the same paths and shapes are
of one kind.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int64
from torch import Tensor

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.models.block_wiring import trace_block
from neuronal_ray.models.blocks import Recording, Stream, find_linears, weight_of
from neuronal_ray.models.routing import find_places

_PROBE_TOKENS = 6
_PROBE_SEQUENCES = (1, 16)  # the second text is used where the first does not reach every linear


@dataclass(frozen=True)
class BlockKinds:
    """The traced kinds of blocks, the signature of each kind, and the kind of each block from the first on."""

    traced: tuple[tuple[LinearSpec, ...], ...] = ()
    signatures: tuple[object, ...] = ()
    of_block: tuple[int, ...] = ()


def trace_layout(stream: Stream) -> Layout:
    """Trace the layout of a model whose blocks are all present."""
    return assemble_layout(trace_kinds(stream, range(len(stream.blocks)), BlockKinds()))


def assemble_layout(kinds: BlockKinds) -> Layout:
    """Return the layout of a model from the kinds of all its blocks."""
    last = len(kinds.of_block) - 1
    return Layout(
        tuple(
            _in_block(spec, index, last=index == last)
            for index, kind in enumerate(kinds.of_block)
            for spec in kinds.traced[kind]
        )
    )


def trace_kinds(stream: Stream, blocks: range, known: BlockKinds) -> BlockKinds:
    """Extend `known`, the kinds of the blocks before, by those of `blocks`.

    The first block of each new kind is run a few times on a few tokens.
    """
    linears_of_block = {index: find_linears(stream.blocks[index]) for index in blocks}
    weights = [id(module.weight) for linears in linears_of_block.values() for module in linears.values()]
    if len(set(weights)) != len(weights):
        raise UnsupportedModel("--model: two blocks share the weights of a linear (tied)")
    texts = [_probe_text(stream, sequences) for sequences in _PROBE_SEQUENCES]
    recordings = [stream.start(text) for text in texts]
    _check_causal(stream, blocks.start, recordings[0], texts[0])
    traced, signatures, of_block = list(known.traced), list(known.signatures), list(known.of_block)
    for index, linears in linears_of_block.items():
        signature = tuple((path, tuple(weight_of(module).shape)) for path, module in linears.items())
        if signature not in signatures:
            traced.append(tuple(trace_block(stream, index, recordings)))
            signatures.append(signature)
        of_block.append(signatures.index(signature))
    return BlockKinds(tuple(traced), tuple(signatures), tuple(of_block))


def _probe_text(stream: Stream, sequences: int) -> Int64[Tensor, "sequences length"]:
    """Return distinct tokens, as far as the vocabulary allows."""
    vocabulary: int = stream.model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(sequences * _PROBE_TOKENS, device=stream.model.device)
    return tokens.reshape(sequences, _PROBE_TOKENS) % vocabulary


def _check_causal(stream: Stream, block: int, recording: Recording, tokens: Int64[Tensor, "sequences length"]) -> None:
    """Raise UnsupportedModel when a token depends on later ones, as in an encoder, which has no perplexity."""
    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0]
    before, after = (stream.block(block, text).hidden[:, :-1] for text in (recording, stream.start(changed)))
    slack = 1e-8
    if find_places(stream.blocks[block], find_linears(stream.blocks[block])):
        # the changed token is routed to other experts, and products with another number of tokens round differently
        slack = 4 * torch.finfo(before.dtype).eps * float(before.nan_to_num().abs().max())
    if not torch.allclose(before, after, atol=slack, equal_nan=True):  # overflow is reported elsewhere
        raise UnsupportedModel(f"--model: {type(stream.model).__name__} is no decoder: its tokens see later ones")


def _in_block(spec: LinearSpec, index: int, *, last: bool) -> LinearSpec:
    """Move `spec`, traced in one block, to block `index`; the output of the last block has no consumer."""
    offset = index - spec.linear.block
    consumer = spec.consumer
    if consumer is not None:
        leaves = consumer.block > spec.linear.block
        consumer = None if last and leaves else Group(consumer.block + offset, consumer.index)
    return replace(
        spec, linear=Linear(index, spec.linear.path), reads=Group(index, spec.reads.index), consumer=consumer
    )
