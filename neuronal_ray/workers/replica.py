"""One copy of the model on one device, passed block by block, with its own weights or others, observed or not."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.core.kernels.freed_memory import keep_freed_memory
from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.core.stats import Statistic
from neuronal_ray.models.blocks import Recording, Stream, find_linears, forwards, is_transposed, set_weight, weight_of
from neuronal_ray.models.checkpoint import Checkpoint, load_model, open_checkpoint
from neuronal_ray.models.fused_modules import fuse
from neuronal_ray.models.routers import keep_routers_dense
from neuronal_ray.models.wiring import BlockKinds, assemble_layout, trace_kinds
from neuronal_ray.workers.observation import observing
from neuronal_ray.workers.stopwatch import Stopwatch

Statistics = Mapping[Group, Statistic]
Weights = Mapping[Linear, Float[Tensor, "rows columns"]]

CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens that pass through a block at once, by the type of device: a GPU's matrix products are faster for more tokens.

Part of the numerics: chunks depend on nothing else, neither on the pool nor on the memory that happens to be free."""


def chunk_sequences(length: int, device: str = "cpu") -> int:
    """Return the number of sequences of `length` tokens in one chunk on a type of device."""
    return max(1, CHUNK_TOKENS[device] // length)


def shard_blocks(num_blocks: int, shard: int, shards: int) -> range:
    """Return the blocks of one of `shards` contiguous ranges, whose sizes differ by at most one block."""
    return range(num_blocks * shard // shards, num_blocks * (shard + 1) // shards)


class Stopped(Exception):
    """The result of the work under way is no longer wanted."""


class Replica:
    """The weights stay dense for its whole life; others are put in place for one pass and taken out again."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        stream: Stream,
        blocks: range,
        stopwatch: Stopwatch,
        *,
        device: torch.device,
        stop: threading.Event,
        layout: Layout | None = None,
    ) -> None:
        """Hold `blocks` of a loaded model; once `stop` is set, text gets no further than its chunk and block."""
        self.checkpoint, self.stream, self.blocks, self.stopwatch = checkpoint, stream, blocks, stopwatch
        self.device, self._stop, self._layout = device, stop, layout
        self.num_blocks: int = checkpoint.config.get_text_config().num_hidden_layers
        self.linears = {index: find_linears(stream.blocks[index]) for index in blocks}
        self.tokens = 0  # that passed through one block, for the record

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        device: str,
        dtype: str,
        trust_remote_code: bool,
        synchronize: bool = False,
        shard: int = 0,
        shards: int = 1,
        offload: bool = False,
    ) -> "Replica":
        """Load all blocks, or those of one of `shards` (from 0); what lies outside the blocks is in every shard.

        With `offload`, weights stay on the host, and a block is copied to the device for its turn. Raises BadInput for
        a checkpoint that cannot be used.
        """
        target = torch.device(device)
        if target.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = False
        checkpoint = open_checkpoint(model_path, trust_remote_code=trust_remote_code)
        blocks = shard_blocks(checkpoint.config.get_text_config().num_hidden_layers, shard, shards)
        model = load_model(
            checkpoint,
            device=torch.device("cpu") if offload else target,
            dtype=_dtype_of(checkpoint, dtype, target),
            trust_remote_code=trust_remote_code,
            blocks=blocks,
        )
        if target.type == "cpu":
            keep_freed_memory()  # from here on: weights do not come and go
        stream = Stream(model, blocks, target if offload else None)
        keep_routers_dense(model, trust_remote_code=trust_remote_code)
        if target.type == "cuda":
            for index in blocks:
                fuse(stream.blocks[index])
        stopwatch = Stopwatch(target, synchronize=synchronize)
        replica = cls(checkpoint, stream, blocks, stopwatch, device=target, stop=threading.Event())
        replica._check_weights()
        if shards == 1:
            replica.trace(BlockKinds())
        return replica

    def twin(self, stop: threading.Event) -> "Replica":
        """Return a replica for another thread to pass at the same time; the weights are the same memory.

        Once `stop` is set, Stopped is raised in the passes of the twin.
        """
        stopwatch = Stopwatch(self.device, synchronize=self.stopwatch.synchronize)
        return Replica(
            self.checkpoint,
            self.stream.twin(),
            self.blocks,
            stopwatch,
            device=self.device,
            stop=stop,
            layout=self._layout,
        )

    @property
    def layout(self) -> Layout:
        """The layout of the whole model."""
        assert self._layout is not None, "a shard is given its layout (keep_layout)"
        return self._layout

    def trace(self, known: BlockKinds) -> BlockKinds:
        """Return the kinds of blocks up to the end of this shard; in the last shard the layout is complete."""
        known = trace_kinds(self.stream, self.blocks, known)
        if self.blocks.stop == self.num_blocks:
            self._layout = assemble_layout(known)
        return known

    @cached_property
    def largest_block_bytes(self) -> int:
        """Bytes of the parameters of the largest block."""
        blocks = self.stream.blocks
        return max(sum(parameter.nbytes for parameter in blocks[index].parameters()) for index in self.blocks)

    def keep_layout(self, layout: Layout) -> None:
        """Keep the layout that the last shard found."""
        self._layout = layout

    def start(
        self, tokens: Int64[Tensor, "sequences length"], *, chunk: int | None = None
    ) -> tuple[list[Int64[Tensor, "sequences length"]], list[Recording]]:
        """Return the text in chunks on the device, and each chunk's embeddings."""
        sequences = chunk or chunk_sequences(tokens.shape[1], self.device.type)
        chunks = list(tokens.to(self.device).split(sequences))
        return chunks, [self.stream.start(chunk) for chunk in chunks]

    def finish(
        self, chunks: Iterable[Int64[Tensor, "sequences length"]], recordings: Iterable[Recording]
    ) -> Iterator[Float[Tensor, "some length vocabulary"]]:
        """Yield the logits of chunks after the last block, for no more tokens at a time than a CPU's chunk has."""
        for tokens, recording in zip(chunks, recordings, strict=True):
            few = chunk_sequences(tokens.shape[1])
            for rows, hidden in zip(tokens.split(few), recording.hidden.split(few), strict=True):
                yield self.stream.finish(rows, Recording(hidden, recording.calls))

    def visited(self, blocks: range) -> Iterator[int]:
        """Yield the blocks one after the other, each on the device for its turn."""
        for index in blocks:
            with self.stream.resident(index, then=index + 1 if index + 1 in blocks else None):
                yield index

    def weight(self, spec: LinearSpec) -> Float[Tensor, "rows columns"]:
        """Return the linear's dense weight, a view."""
        return weight_of(self.module(spec))

    def name(self, spec: LinearSpec) -> str:
        """Return the name of the linear's weight in the model."""
        return f"{self.stream.blocks_name}.{spec.linear.block}.{spec.linear.path}.weight"

    def module(self, spec: LinearSpec) -> nn.Module:
        """Return the linear."""
        return self.linears[spec.linear.block][spec.linear.path]

    def run(
        self, index: int, recordings: Iterable[Recording], kinds: tuple[type[Statistic], ...] = ()
    ) -> tuple[list[Recording], list[dict[Group, Statistic]]]:
        """Pass text through block `index` as it stands; return it with the input statistics of its groups, by kind."""
        observed: list[dict[Group, Statistic]] = [{} for _ in kinds]
        readers = self.layout.first_readers(index).values() if kinds else ()
        firsts = [(spec, self.module(spec)) for spec in readers]
        outputs = []
        for recording in recordings:
            if self._stop.is_set():
                raise Stopped
            self.tokens += recording.hidden.shape[:2].numel()
            with observing(firsts, kinds, observed, sequences=len(recording.hidden), stopwatch=self.stopwatch):
                outputs.append(self.stream.block(index, recording))
        routed = [spec.reads for spec in self.layout.blocks[index] if spec.expert is not None] if kinds else []
        if routed:
            sequences = sum(len(output.hidden) for output in outputs)
            for known in observed:
                known |= {group: known[group].over(sequences) for group in routed if group in known}
        return outputs, observed

    def run_with(
        self, index: int, recordings: Iterable[Recording], weights: Weights, kinds: tuple[type[Statistic], ...] = ()
    ) -> tuple[list[Recording], list[dict[Group, Statistic]]]:
        """Do `run` with other weights in block `index`, then put the dense weights back."""
        with self.stopwatch.measure("sparse forwards"), self.swapped(weights):
            return self.run(index, recordings, kinds)

    def differentiable(
        self, index: int, recording: Recording, weights: Weights
    ) -> Float[Tensor, "sequences tokens features"]:
        """Return the hidden states after block `index` with other weights, with the graph of their gradients."""
        args, kwargs = recording.calls[index]
        linears = self.linears[index]
        named = {
            f"{linear.path}.weight": weight.t() if is_transposed(linears[linear.path]) else weight
            for linear, weight in weights.items()
        }
        with torch.enable_grad():
            output = functional_call(self.stream.blocks[index], named, (recording.hidden, *args), kwargs)
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    @contextmanager
    def without_output(self, index: int) -> Iterator[None]:
        """Leave out the products of the last group of block `index`: no later input of the block depends on them."""
        last = max(spec.reads for spec in self.layout.blocks[index])
        skipped = {id(self.module(spec)): spec.rows for spec in self.layout.groups[last]}

        def skip(_: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
            return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], skipped[id(module)])

        with forwards((self.module(spec) for spec in self.layout.groups[last]), skip):
            yield

    @contextmanager
    def outputs(self, specs: Iterable[LinearSpec]) -> Iterator[dict[Linear, list[Tensor]]]:
        """Collect the outputs of linears, one tensor per chunk of text, while the context lasts."""
        found: dict[Linear, list[Tensor]] = {}
        handles = []
        for spec in specs:
            kept = found.setdefault(spec.linear, [])

            def keep(_module: nn.Module, _args: object, output: Tensor, kept: list[Tensor] = kept) -> None:
                kept.append(output)

            handles.append(self.module(spec).register_forward_hook(keep))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def swapped(self, weights: Weights) -> Iterator[None]:
        """Put other weights in place of linears' own, which come back on exit."""
        modules = {linear: self.linears[linear.block][linear.path] for linear in weights}
        own = {linear: weight_of(module) for linear, module in modules.items()}
        try:
            for linear, weight in weights.items():
                set_weight(modules[linear], weight)
            yield
        finally:
            for linear, weight in own.items():
                set_weight(modules[linear], weight)

    def _check_weights(self) -> None:
        """Raise BadInput for a weight that is NaN or infinite, in the blocks or outside, the head's included."""
        for block, linears in self.linears.items():
            for path, module in linears.items():
                if not bool(torch.isfinite(weight_of(module)).all()):
                    raise BadInput(f"--model: NaN or infinite weights in {Linear(block, path)}")
        checked = {id(module.weight) for linears in self.linears.values() for module in linears.values()}
        for name, parameter in self.stream.model.named_parameters():
            if id(parameter) not in checked and not bool(torch.isfinite(parameter).all()):
                raise BadInput(f"--model: NaN or infinite weights in {name}")


def _dtype_of(checkpoint: Checkpoint, name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    stored: torch.dtype | None = checkpoint.config.get_text_config().dtype
    return torch.float32 if stored is None or device.type == "cpu" else stored
