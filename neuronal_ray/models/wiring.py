"""Who reads whom inside a block, measured by running it: no table of families, no guess from names.

Linears are grouped by the identity of their input tensor. The consumer of a linear is the first group whose
input changes when the linear's output is disturbed; a linear that disturbs no later group of its block is read by the
next block's first group. Rows are matched to the consumer's columns one to one, by attention heads (grouped-query
keys and values, fused projections) or by halves (fused gate and up); where the layout of a fused projection is
ambiguous, the rows that would tell the layouts apart are disturbed and the block answers.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.models.blocks import Recording, Stream, UnsupportedModel, find_linears, weight_of

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 6
_CHANGED = 0.05  # a change counts from this fraction of the largest: a norm over all heads leaks a little


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

    def groups(self) -> dict[str, int]:
        """Group index of each linear: the order in which distinct input tensors were first read."""
        seen: dict[tuple[object, ...], int] = {}
        return {
            path: seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), len(seen))
            for path, tensor in self._received.items()
        }


def trace_layout(stream: Stream) -> Layout:
    """The layout of all blocks; each distinct kind of block is run a few times on a handful of tokens."""
    model = stream.model
    linears_of_block = [find_linears(block) for block in stream.blocks]
    weights = [id(module.weight) for linears in linears_of_block for module in linears.values()]
    if len(set(weights)) != len(weights):
        raise UnsupportedModel("--model: two blocks share the weights of a linear (tied)")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(_PROBE_TOKENS, device=model.device)[None] % vocabulary  # [1, tokens]
    recording = stream.start(tokens)
    _check_causal(stream, recording, tokens)
    num_heads = model.config.get_text_config().num_attention_heads
    known: dict[tuple[object, ...], list[LinearSpec]] = {}
    specs: list[LinearSpec] = []
    for index, linears in enumerate(linears_of_block):
        signature = tuple((path, weight_of(module).shape) for path, module in linears.items())
        if signature not in known:
            known[signature] = _Prober(stream, index, recording, num_heads).specs()
        specs += [_in_block(spec, index, last=index == len(linears_of_block) - 1) for spec in known[signature]]
    return Layout(tuple(specs))


def _check_causal(stream: Stream, recording: Recording, tokens: Int64[Tensor, "sequences length"]) -> None:
    """Raise UnsupportedModel when a token sees later ones, as in an encoder: there would be no perplexity."""
    changed = tokens.clone()
    changed[:, -1] = tokens[:, 0]
    before, after = (stream.block(0, text).hidden[:, :-1] for text in (recording, stream.start(changed)))
    if not torch.allclose(before, after, equal_nan=True):  # overflow is another error
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


class _Prober:
    """Runs one block with and without disturbances and compares what its linears receive."""

    def __init__(self, stream: Stream, index: int, recording: Recording, num_heads: int) -> None:
        self.stream, self.index, self.recording, self.num_heads = stream, index, recording, num_heads
        self.linears = find_linears(stream.blocks[index])
        self.baseline = self._run()
        self.groups = self.baseline.groups()
        never = set(self.linears) - set(self.groups)
        if never:
            raise UnsupportedModel(f"--model: linears that text does not pass through: {', '.join(sorted(never))}")

    def specs(self) -> list[LinearSpec]:
        """The block's linears in order of execution."""
        return [self._spec(path) for path in self.baseline.inputs]

    def _spec(self, path: str) -> LinearSpec:
        rows, columns = weight_of(self.linears[path]).shape
        reader = self._first_reader(path)
        consumer = Group(self.index + 1, 0) if reader is None else Group(self.index, self.groups[reader])
        width = self.baseline.inputs[reader or next(iter(self.baseline.inputs))].shape[-1]
        sources: Int64[Tensor, "rows fan"] | None = None
        if rows != width:
            candidates = [] if reader is None else row_layouts(rows, width, self.num_heads)
            if not candidates:
                logger.warning("%s: its rows match no columns of its reader; they keep the block's rate", path)
            sources = self._decide(path, reader, candidates) if reader and candidates else None
        return LinearSpec(
            linear=Linear(self.index, path),
            rows=rows,
            columns=columns,
            reads=Group(self.index, self.groups[path]),
            consumer=consumer if rows == width or sources is not None else None,
            sources=sources,
        )

    def _first_reader(self, path: str) -> str | None:
        """The first linear whose input depends on the output of `path`; None if there is none in the block."""
        disturbed = self._run(disturb=path)
        for other, before in self.baseline.inputs.items():
            if not torch.equal(before, disturbed.inputs[other]):
                return other
        return None

    def _decide(self, path: str, reader: str, candidates: list["RowLayout"]) -> Int64[Tensor, "rows fan"]:
        """The candidate that the block's reaction supports: a row on which two disagree is disturbed."""
        best = candidates[0]
        for other in candidates[1:]:
            differing = (best.reached() != other.reached()).any(dim=1).nonzero()[:, 0]
            if len(differing) == 0:
                continue
            row = differing[:1]
            change = self._run(disturb=path, rows=row).inputs[reader] - self.baseline.inputs[reader]
            change = change.float().abs().flatten(0, -2).mean(dim=0).cpu()  # [sequences, tokens, columns] -> [columns]
            if _agreement(change, other.reached()[row[0]]) > _agreement(change, best.reached()[row[0]]):
                best = other
        return best.sources

    @torch.no_grad()
    def _run(self, *, disturb: str | None = None, rows: Tensor | None = None) -> _Trace:
        trace = _Trace()
        handles = [module.register_forward_pre_hook(trace.watch(path)) for path, module in self.linears.items()]
        if disturb is not None:
            handles.append(self.linears[disturb].register_forward_hook(lambda _, __, output: _noisy(output, rows)))
        try:
            self.stream.block(self.index, self.recording)
        finally:
            for handle in handles:
                handle.remove()
        return trace


@dataclass(frozen=True)
class RowLayout:
    """A way in which rows may stand for columns of their reader: `sources` [rows, fan].

    A disturbed row reaches the whole unit (attention head) of `unit` columns that its sources lie in.
    """

    sources: Int64[Tensor, "rows fan"]
    unit: int
    columns: int

    def reached(self) -> Bool[Tensor, "rows columns"]:
        """Which columns react to which row."""
        units = torch.zeros(len(self.sources), self.columns // self.unit, dtype=torch.bool)
        units.scatter_(1, self.sources // self.unit, True)
        return units.repeat_interleave(self.unit, dim=1)  # [rows, units] -> [rows, columns]


def row_layouts(rows: int, columns: int, num_heads: int) -> list[RowLayout]:
    """The layouts in which `rows` outputs can stand for `columns` inputs of their reader, rows != columns.

    Grouped-query keys or values: each head serves the query heads of its group. Fused query, key and value: one
    after the other, or together per group of heads. Fused gate and up: one after the other, or alternating.
    """
    layouts: list[RowLayout] = []
    if rows == 2 * columns:
        column = torch.arange(columns)
        layouts += [
            RowLayout(sources[:, None], 1, columns) for sources in (column.repeat(2), column.repeat_interleave(2))
        ]
    head_dim = columns // num_heads
    if columns % num_heads or rows % head_dim:
        return layouts
    row_heads = rows // head_dim
    if row_heads < num_heads and num_heads % row_heads == 0:
        layouts.append(_by_heads(_key_heads(row_heads, num_heads), head_dim, columns))
    num_keys, odd = divmod(row_heads - num_heads, 2)
    if num_keys > 0 and not odd and num_heads % num_keys == 0:
        fan = num_heads // num_keys
        queries = torch.arange(num_heads)[:, None].expand(-1, fan)  # [query heads, fan], each its own only source
        keys = _key_heads(num_keys, num_heads)  # [key heads, fan]
        layouts.append(_by_heads(torch.cat([queries, keys, keys]), head_dim, columns))
        together = torch.cat([queries.reshape(num_keys, fan, fan), keys[:, None], keys[:, None]], dim=1)
        layouts.append(_by_heads(together.reshape(row_heads, fan), head_dim, columns))
    return layouts


def _key_heads(num_keys: int, num_heads: int) -> Int64[Tensor, "keys fan"]:
    """The query heads that each key head serves."""
    return torch.arange(num_heads).reshape(num_keys, -1)


def _by_heads(heads: Int64[Tensor, "row_heads fan"], head_dim: int, columns: int) -> RowLayout:
    """Row (head, dim) stands for column (source head, dim)."""
    dims = torch.arange(head_dim)
    sources = heads[:, None, :] * head_dim + dims[None, :, None]  # [row heads, head dim, fan]
    return RowLayout(sources.flatten(0, 1), head_dim, columns)


def _noisy(output: Tensor, rows: Tensor | None) -> Tensor:
    """`output` with noise of its own scale added to the given rows (features), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator) * (output.float().std().cpu() + 1e-3)
    chosen = torch.ones(output.shape[-1]) if rows is None else torch.zeros(output.shape[-1]).index_fill(0, rows, 1.0)
    return output + (noise * chosen).to(output)


def _agreement(change: Tensor, reached: Tensor) -> float:
    """How well the columns that changed and the columns said to be reached coincide: common ones over all.

    Counted, not averaged: one column that changed a lot must not outweigh the rest of its attention head.
    """
    changed = change > _CHANGED * change.max()
    return float((changed & reached).sum() / (changed | reached).sum())
