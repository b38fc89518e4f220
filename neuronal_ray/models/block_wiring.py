"""Who reads whom inside a block, measured by running it with disturbed outputs.

Linears are grouped by the identity of their input tensor. The consumer of a linear is the first group whose input
changes when the linear's output is disturbed; a linear that changes no later group of its block is read by the next
block's first group. Rows are matched to the consumer's columns one to one, by attention heads (grouped-query keys and
values, fused projections) or by halves (fused gate and up). Where several mappings of a fused projection are possible,
the rows on which they differ are disturbed, and the columns that change decide.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.core.layout import Group, Linear, LinearSpec
from neuronal_ray.models.blocks import Recording, Stream, find_linears, weight_of
from neuronal_ray.models.routing import Routing
from neuronal_ray.models.row_layouts import RowLayout, row_layouts

logger = logging.getLogger(__name__)

_CHANGED = 0.05  # of the largest change: a smaller one does not count, as a norm over all heads leaks a little
_FORESEEN = 0.5  # a mapping is refused if it names less than this fraction of the columns that change with a row


def trace_block(stream: Stream, index: int, recordings: Sequence[Recording]) -> list[LinearSpec]:
    """Measure the wiring of block `index`: its linears in order of execution, experts in order of index.

    `recordings` are texts at the block's input; a later one is used where those before do not reach every linear.
    Raises UnsupportedModel for a linear that no text reaches or that runs more than once.
    """
    return _Prober(stream, index, recordings).specs()


class _Trace:
    """The inputs of a block's linears in one run, in order of execution."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self._received: dict[str, Tensor] = {}  # kept alive, so that no two tensors share an address

    def watch(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """Return a forward pre-hook that records the input of `path`."""

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if path in self.inputs:
                raise UnsupportedModel(f"--model: {path} runs more than once in a block")
            self._received[path] = args[0]
            self.inputs[path] = args[0].clone()

        return note

    def tokens(self) -> dict[str, int]:
        """Count the tokens that each linear received, in order of execution."""
        return {path: inputs[..., 0].numel() for path, inputs in self.inputs.items()}

    def groups(self) -> dict[str, int]:
        """Return the number of each linear's input tensor, in the order in which distinct tensors were first read."""
        seen: dict[tuple[object, ...], int] = {}
        return {
            path: seen.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride()), len(seen))
            for path, tensor in self._received.items()
        }


@dataclass(frozen=True, kw_only=True)
class _Wire:
    """The first linear that reads the output of another one, None for the first of the next block.

    `matched`: the rows correspond to the reader's columns, by `sources` or one to one.
    """

    reader: str | None
    sources: Int64[Tensor, "rows fan"] | None
    matched: bool


class _Prober:
    """Runs one block with and without disturbed outputs and compares the inputs of its linears."""

    def __init__(self, stream: Stream, index: int, recordings: Sequence[Recording]) -> None:
        self.stream, self.index = stream, index
        self.num_heads: int | None = getattr(stream.model.config.get_text_config(), "num_attention_heads", None)
        self.linears = find_linears(stream.blocks[index])
        for recording in recordings:
            self.recording = recording
            self.baseline = self._run()
            tokens = recording.hidden[..., 0].numel()
            self.routing = Routing(stream.blocks[index], self.linears, seen=self.baseline.tokens(), tokens=tokens)
            never = set(self.linears) - set(self.routing.order)
            if not never:
                break
        else:
            raise UnsupportedModel(f"--model: linears that no text passes through: {', '.join(sorted(never))}")
        self.groups = self._groups()

    def specs(self) -> list[LinearSpec]:
        """Describe the block's linears in order of execution, experts in order of index."""
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
                    sub_block="attention" if stand_in in attention else "mlp",
                    expert=None if expert is None else expert[1],
                )
            )
        return specs

    def _groups(self) -> dict[str, int]:
        """Return the group index of each linear in order; linears of different experts are in different groups."""
        tensors = self.baseline.groups()
        seen: dict[object, int] = {}
        return {
            path: seen.setdefault((tensors[self.routing.stand_in(path)], self.routing.expert(path)), len(seen))
            for path in self.routing.order
        }

    def _wire(self, path: str) -> _Wire:
        """Measure the wiring of a linear that ran."""
        rows = weight_of(self.linears[path]).shape[0]
        reader = self._first_reader(path)
        width = self.baseline.inputs[reader or next(iter(self.baseline.inputs))].shape[-1]
        if rows == width:
            return _Wire(reader=reader, sources=None, matched=True)
        sources = None
        if reader is not None and not self.routing.enters(path, reader):
            sources = self._decide(path, reader, row_layouts(rows, width, self.num_heads))
        if sources is None:
            logger.warning("%s: its rows match no columns of its reader and keep the block's rate", path)
        return _Wire(reader=reader, sources=sources, matched=sources is not None)

    def _first_reader(self, path: str) -> str | None:
        """Return the first linear whose input depends on the output of `path`; None if there is none in the block."""
        disturbed = self._run(path, _noisy)
        for other, before in self.baseline.inputs.items():
            after = disturbed.inputs.get(other)  # None: routed elsewhere
            if after is None or not torch.equal(before, after):
                return other
        return None

    def _decide(self, path: str, reader: str, candidates: list[RowLayout]) -> Int64[Tensor, "rows fan"] | None:
        """Return the sources of the candidate that agrees with the changed columns, None if all contradict them.

        Candidates are compared by disturbing a row on which they differ; the best is then checked on a few other rows.
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
        """Return which columns of the reader's input change with one row of `path`."""
        disturbed = self._run(path, partial(_noisy, rows=torch.tensor([row]))).inputs[reader]
        change = (disturbed - self.baseline.inputs[reader]).float().abs().flatten(0, -2).mean(dim=0).cpu()  # [columns]
        return change > _CHANGED * change.max()

    def _attention(self, wires: Mapping[str, _Wire]) -> set[str]:
        """Return the linears around the mixing of tokens.

        They are the linears whose output at one token changes their reader's input at another (keys, values), all
        others that this reader reads (queries), the reader itself, and low-rank factors that lead only to these.
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
        """Return whether the output at the first token changes the reader's input at another; experts mix no tokens."""
        if reader is None or self.routing.expert(path) is not None or self.routing.expert(reader) is not None:
            return False
        runs = (self.baseline, self._run(path, partial(_noisy, first_token_only=True)))
        before, after = (run.inputs[reader].flatten(0, -2)[1:] for run in runs)  # [tokens but the first, columns]
        return not torch.equal(before, after)

    def _alone(self, path: str, reader: str) -> bool:
        """Return whether the block's input reaches the reader only through `path`.

        If it does, another input of the block changes nothing there while the output of `path` is zero.
        """
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
        """Run the block, with `change` applied to the output of `path`, and return the inputs of its linears."""
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
    """Add noise of the output's own scale to the given rows (features), the same in every call."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(output.shape, generator=generator) * (output.float().std().cpu() + 1e-3)
    if rows is not None:
        noise *= torch.zeros(output.shape[-1]).index_fill(0, rows, 1.0)
    if first_token_only:
        noise.view(-1, output.shape[-1])[1:] = 0
    return output + noise.to(output)


def _agreement(changed: Bool[Tensor, " columns"], reached: Bool[Tensor, " columns"]) -> float:
    """Return the number of columns in both masks over the number in either.

    Columns are counted, not weighted: one that changed a lot must not outweigh the rest of its attention head.
    """
    return float((changed & reached).sum() / (changed | reached).sum())
