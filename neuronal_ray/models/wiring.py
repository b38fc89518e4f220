"""Who reads whom inside a block, measured by running it: no table of families, no guess from names.

Linears are grouped by the identity of their input tensor. The consumer of a linear is the first group whose
input changes when the linear's output is disturbed; a linear that disturbs no later group of its block is read by the
next block's first group. Rows are matched to the consumer's columns one to one, by attention heads (grouped-query
keys and values, fused projections) or by halves (fused gate and up); where the layout of a fused projection is
ambiguous, the rows that would tell the layouts apart are disturbed and the block answers.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.models.blocks import Recording, Stream, find_linears, weight_of
from neuronal_ray.models.routing import Routing, find_places
from neuronal_ray.models.row_layouts import RowLayout, row_layouts

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 6
_PROBE_SEQUENCES = (1, 16)  # more where the first do not reach every linear
_CHANGED = 0.05  # a change counts from this fraction of the largest: a norm over all heads leaks a little
_FORESEEN = 0.5  # of the columns that react to a row, the fraction that a layout must name, or it is none


class _Trace:
    """The inputs that the linears of a block received in one run, in order of execution."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self._received: dict[str, Tensor] = {}  # kept alive: a freed address could name two tensors

    def watch(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A forward pre-hook that notes the input of `path`."""

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if path in self.inputs:
                raise UnsupportedModel(f"--model: {path} runs more than once in a block")
            self._received[path] = args[0]
            self.inputs[path] = args[0].clone()

        return note

    def tokens(self) -> dict[str, int]:
        """How many tokens each linear received, in order of execution."""
        return {path: inputs[..., 0].numel() for path, inputs in self.inputs.items()}

    def groups(self) -> dict[str, int]:
        """Group index of each linear: the order in which distinct input tensors were first read."""
        seen: dict[tuple[object, ...], int] = {}
        return {
            path: seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), len(seen))
            for path, tensor in self._received.items()
        }


@dataclass(frozen=True)
class Kinds:
    """The kinds of blocks met so far, each traced once, and of which kind each block is, from the first on."""

    traced: tuple[tuple[LinearSpec, ...], ...] = ()
    signatures: tuple[object, ...] = ()
    of_block: tuple[int, ...] = ()


def trace_layout(stream: Stream) -> Layout:
    """The layout of all blocks."""
    return assembled(trace_kinds(stream, range(len(stream.blocks)), Kinds()))


def assembled(kinds: Kinds) -> Layout:
    """The layout of the model, from the kinds of all its blocks."""
    last = len(kinds.of_block) - 1
    return Layout(
        tuple(
            _in_block(spec, index, last=index == last)
            for index, kind in enumerate(kinds.of_block)
            for spec in kinds.traced[kind]
        )
    )


def trace_kinds(stream: Stream, blocks: range, known: Kinds) -> Kinds:
    """`known`, of the blocks before, with that of `blocks`.

    Each distinct kind of block is run a few times on a handful of tokens, where it is met first.
    """
    model = stream.model
    linears_of_block = {index: find_linears(stream.blocks[index]) for index in blocks}
    weights = [id(module.weight) for linears in linears_of_block.values() for module in linears.values()]
    if len(set(weights)) != len(weights):
        raise UnsupportedModel("--model: two blocks share the weights of a linear (tied)")
    texts = [_probe_text(stream, sequences) for sequences in _PROBE_SEQUENCES]
    recordings = [stream.start(text) for text in texts]
    _check_causal(stream, blocks.start, recordings[0], texts[0])
    num_heads = model.config.get_text_config().num_attention_heads
    traced, signatures, of_block = list(known.traced), list(known.signatures), list(known.of_block)
    for index, linears in linears_of_block.items():
        signature = tuple((path, tuple(weight_of(module).shape)) for path, module in linears.items())
        if signature not in signatures:
            traced.append(tuple(_Prober(stream, index, recordings, num_heads).specs()))
            signatures.append(signature)
        of_block.append(signatures.index(signature))
    return Kinds(tuple(traced), tuple(signatures), tuple(of_block))


def _probe_text(stream: Stream, sequences: int) -> Int64[Tensor, "sequences length"]:
    """Distinct tokens, as far as the vocabulary goes."""
    vocabulary: int = stream.model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(sequences * _PROBE_TOKENS, device=stream.model.device)
    return tokens.reshape(sequences, _PROBE_TOKENS) % vocabulary


def _check_causal(stream: Stream, block: int, recording: Recording, tokens: Int64[Tensor, "sequences length"]) -> None:
    """Raise UnsupportedModel when a token sees later ones, as in an encoder: there would be no perplexity."""
    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0]
    before, after = (stream.block(block, text).hidden[:, :-1] for text in (recording, stream.start(changed)))
    slack = 1e-8
    if find_places(stream.blocks[block], find_linears(stream.blocks[block])):
        # the changed token goes to other experts, and products of another number of tokens round differently
        slack = 4 * torch.finfo(before.dtype).eps * float(before.nan_to_num().abs().max())
    if not torch.allclose(before, after, atol=slack, equal_nan=True):  # overflow is another error
        raise UnsupportedModel(f"--model: {type(stream.model).__name__} is no decoder: its tokens see later ones")


def _in_block(spec: LinearSpec, index: int, *, last: bool) -> LinearSpec:
    """`spec`, traced in one block, moved to block `index`; the last block's output has no consumer."""
    offset = index - spec.linear.block
    consumer = spec.consumer
    if consumer is not None:
        leaves = consumer.block > spec.linear.block
        consumer = None if last and leaves else Group(consumer.block + offset, consumer.index)
    return replace(
        spec, linear=Linear(index, spec.linear.path), reads=Group(index, spec.reads.index), consumer=consumer
    )


@dataclass(frozen=True, kw_only=True)
class _Wire:
    """Where the output of a linear goes: the first linear that reads it, None for the next block's first.

    `matched`: its rows match the reader's columns, by `sources` or one to one.
    """

    reader: str | None
    sources: Int64[Tensor, "rows fan"] | None
    matched: bool


class _Prober:
    """Runs one block with and without disturbances and compares what its linears receive."""

    def __init__(self, stream: Stream, index: int, recordings: list[Recording], num_heads: int) -> None:
        self.stream, self.index, self.num_heads = stream, index, num_heads
        self.linears = self._products(find_linears(stream.blocks[index]), recordings[0])
        for recording in recordings:
            self.recording = recording
            self.baseline = self._run()
            tokens = recording.hidden[..., 0].numel()
            self.routing = Routing(stream.blocks[index], self.linears, seen=self.baseline.tokens(), tokens=tokens)
            never = set(self.linears) - set(self.routing.order)
            if not never:
                break
        else:
            raise UnsupportedModel(f"--model: linears that text does not pass through: {', '.join(sorted(never))}")
        self.groups = self._groups()

    @torch.no_grad()
    def _products(self, linears: dict[str, nn.Module], recording: Recording) -> dict[str, nn.Module]:
        """Without routers that are a kind of nn.Linear: they return their choice beside the product."""
        routers: list[str] = []

        def note(path: str) -> Callable[[nn.Module, object, object], None]:
            return lambda _, __, output: None if isinstance(output, Tensor) else routers.append(path)

        handles = [module.register_forward_hook(note(path)) for path, module in linears.items()]
        try:
            self.stream.block(self.index, recording)
        finally:
            for handle in handles:
                handle.remove()
        for path in routers:
            logger.warning("%s: returns more than a product, as routers do; it is not pruned", path)
        return {path: module for path, module in linears.items() if path not in routers}

    def specs(self) -> list[LinearSpec]:
        """The block's linears in order of execution, experts in order of index."""
        stand_ins = {path: self.routing.stand_in(path) for path in self.routing.order}
        wires = {path: self._wire(path) for path in dict.fromkeys(stand_ins.values())}
        attention = self._attention(wires)
        specs = []
        for path, stand_in in stand_ins.items():
            wire, expert = wires[stand_in], self.routing.expert(path)
            consumer = Group(self.index + 1, 0)
            if wire.reader is not None:
                consumer = Group(self.index, self.groups[self.routing.seen_from(path, wire.reader)])
            rows, columns = weight_of(self.linears[path]).shape
            specs.append(
                LinearSpec(
                    linear=Linear(self.index, path),
                    rows=rows,
                    columns=columns,
                    reads=Group(self.index, self.groups[path]),
                    consumer=consumer if wire.matched else None,
                    sources=wire.sources,
                    part="attention" if stand_in in attention else "mlp",
                    expert=None if expert is None else expert[1],
                )
            )
        return specs

    def _groups(self) -> dict[str, int]:
        """Group index of each linear in order; the linears of one expert that read one tensor are a group."""
        tensors = self.baseline.groups()
        seen: dict[object, int] = {}
        return {
            path: seen.setdefault((tensors[self.routing.stand_in(path)], self.routing.expert(path)), len(seen))
            for path in self.routing.order
        }

    # -- who reads whom ----------------------------------------------------------------------------------------

    def _wire(self, path: str) -> _Wire:
        """The wiring of a linear that ran."""
        rows = weight_of(self.linears[path]).shape[0]
        reader = self._first_reader(path)
        width = self.baseline.inputs[reader or next(iter(self.baseline.inputs))].shape[-1]
        if rows == width:
            return _Wire(reader=reader, sources=None, matched=True)
        sources = None
        if reader is not None and not self.routing.enters(path, reader):
            sources = self._decide(path, reader, row_layouts(rows, width, self.num_heads))
        if sources is None:
            logger.warning("%s: its rows match no columns of its reader; they keep the block's rate", path)
        return _Wire(reader=reader, sources=sources, matched=sources is not None)

    def _first_reader(self, path: str) -> str | None:
        """The first linear whose input depends on the output of `path`; None if there is none in the block."""
        disturbed = self._run(path, _noisy)
        for other, before in self.baseline.inputs.items():
            after = disturbed.inputs.get(other)  # None: routed elsewhere
            if after is None or not torch.equal(before, after):
                return other
        return None

    def _decide(self, path: str, reader: str, candidates: list[RowLayout]) -> Int64[Tensor, "rows fan"] | None:
        """The candidate that the block's reaction supports, None if it contradicts all of them.

        A row on which two candidates disagree is disturbed; then rows spread over all, against the best.
        """
        if not candidates:
            return None
        best = candidates[0]
        for other in candidates[1:]:
            differing = (best.reached() != other.reached()).any(dim=1).nonzero()[:, 0]
            if len(differing) == 0:
                continue
            changed = self._changed_columns(path, reader, row := int(differing[0]))
            if _agreement(changed, other.reached()[row]) > _agreement(changed, best.reached()[row]):
                best = other
        num_rows = len(best.sources)
        for row in range(num_rows // 8, num_rows, max(1, num_rows // 4)):
            changed = self._changed_columns(path, reader, row)
            if int((changed & best.reached()[row]).sum()) < _FORESEEN * int(changed.sum()):
                return None
        return best.sources

    def _changed_columns(self, path: str, reader: str, row: int) -> Bool[Tensor, " columns"]:
        """Which columns of the reader's input react to one row of `path`."""
        disturbed = self._run(path, partial(_noisy, rows=torch.tensor([row]))).inputs[reader]
        change = (disturbed - self.baseline.inputs[reader]).float().abs().flatten(0, -2).mean(dim=0).cpu()  # [columns]
        return change > _CHANGED * change.max()

    # -- parts -------------------------------------------------------------------------------------------------

    def _attention(self, wires: Mapping[str, _Wire]) -> set[str]:
        """The linears around the mixing of tokens.

        Those whose output at one token changes their reader's input at another (keys, values), all others that this
        reader reads (queries), the reader itself, and low-rank factors that only lead to one of these.
        """
        group_read = {path: None if wire.reader is None else self.groups[wire.reader] for path, wire in wires.items()}
        mixed = {group_read[path] for path, wire in wires.items() if self._mixes(path, wire.reader)}
        attention = {path for path in wires if {self.groups[path], group_read[path]} & mixed}
        while True:
            factors = {
                path
                for path, wire in wires.items()
                if path not in attention and wire.reader in attention and self._alone(path, wire.reader)
            }
            if not factors:
                return attention
            attention |= factors

    def _mixes(self, path: str, reader: str | None) -> bool:
        """Return whether the output at the first token acts on the reader's input at another; experts mix none."""
        if reader is None or self.routing.expert(path) is not None or self.routing.expert(reader) is not None:
            return False
        runs = (self.baseline, self._run(path, partial(_noisy, first_token_only=True)))
        before, after = (run.inputs[reader].flatten(0, -2)[1:] for run in runs)  # [tokens but the first, columns]
        return not torch.equal(before, after)

    def _alone(self, path: str, reader: str) -> bool:
        """Return whether the block's input reaches the reader by `path` only: with its output held, nothing changes there."""
        other = replace(self.recording, hidden=self.recording.hidden.roll(1, dims=1))
        before, after = (
            self._run(path, torch.zeros_like, recording=recording).inputs[reader]
            for recording in (self.recording, other)
        )
        return torch.equal(before, after)

    @torch.no_grad()
    def _run(
        self,
        path: str | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
        *,
        recording: Recording | None = None,
    ) -> _Trace:
        """What the linears receive; `change` is applied to the output of `path`."""
        trace = _Trace()
        handles = [module.register_forward_pre_hook(trace.watch(name)) for name, module in self.linears.items()]
        if path is not None and change is not None:
            handles.append(self.linears[path].register_forward_hook(lambda _, __, output: change(output)))
        try:
            self.stream.block(self.index, recording or self.recording)
        finally:
            for handle in handles:
                handle.remove()
        return trace


def _noisy(output: Tensor, *, rows: Tensor | None = None, first_token_only: bool = False) -> Tensor:
    """`output` with noise of its own scale added to the given rows (features), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator) * (output.float().std().cpu() + 1e-3)
    if rows is not None:
        noise *= torch.zeros(output.shape[-1]).index_fill(0, rows, 1.0)
    if first_token_only:
        noise.view(-1, output.shape[-1])[1:] = 0
    return output + noise.to(output)


def _agreement(changed: Bool[Tensor, " columns"], reached: Bool[Tensor, " columns"]) -> float:
    """How well the columns that changed and the columns said to be reached coincide: common ones over all.

    Counted, not averaged: one column that changed a lot must not outweigh the rest of its attention head.
    """
    return float((changed & reached).sum() / (changed | reached).sum())
