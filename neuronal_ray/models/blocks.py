"""Transformer blocks of any decoder: finding them, recording their arguments, and running them one at a time."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models.experts import Expert, experts_of, is_matrices, split_experts
from neuronal_ray.models.offload import OffloadedBlocks

_DENSE = "neuronal_ray_keeps_dense"
"""The attribute of a module that is not pruned; a copy of the module has it too."""

Model = PreTrainedModel
Call = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Recording:
    """The hidden states of a text between two blocks, and the other arguments of each block."""

    hidden: Float[Tensor, "sequences tokens features"]
    calls: tuple[Call, ...]


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what transformers refuses by a ValueError, an architecture or an attention say, into UnsupportedModel."""
    try:
        yield
    except BadInput:
        raise
    except ValueError as error:
        raise UnsupportedModel(f"--model: {str(error).strip().splitlines()[0]}") from error


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of the transformer blocks: the one ModuleList of the length in the text config."""
    num_blocks = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    if len(lists) != 1:
        raise UnsupportedModel(
            f"--model: expected one list of {num_blocks} transformer blocks in {type(model).__name__}, "
            f"found {len(lists)}: {', '.join(name for name, _ in lists) or 'none'}"
        )
    return lists[0]


def keep_dense(module: nn.Module) -> None:
    """Mark a linear that is not pruned."""
    vars(module)[_DENSE] = True


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """Return the prunable linears of a block by path. Raises UnsupportedModel for weights that would be missed.

    Experts in 3-D parameters are included once `split_experts` has run. Linears that `keep_dense` marked are left out;
    depthwise convolutions and vectors are no linears.
    """
    linears: dict[str, nn.Module] = {}
    split: set[str] = set()
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and _DENSE not in vars(module):
            linears[path] = module
        for inner, expert in experts_of(module).items():
            linears[f"{path}.{inner}"] = expert
            split.add(f"{path}.{expert.stack}")
    for name, parameter in block.named_parameters():
        if is_matrices(parameter) and name not in split and not _is_depthwise(block, name):
            raise UnsupportedModel(
                f"--model: {name} holds {tuple(parameter.shape)} weights as one parameter (convolution, experts in "
                "an unknown form); only nn.Linear weights and stacks of experts can be pruned"
            )
    if not linears:
        raise UnsupportedModel(f"--model: no nn.Linear in a block of type {type(block).__name__}")
    weights = [module.weight for module in linears.values()]
    if len({id(weight) for weight in weights}) != len(weights):
        raise UnsupportedModel("--model: two linears of a block share one weight (tied)")
    return linears


def _is_depthwise(block: nn.Module, name: str) -> bool:
    """Return whether a parameter belongs to a convolution that mixes no channels; it stays dense."""
    module = block.get_submodule(name.rpartition(".")[0])
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module stores its weight as [columns, rows] (GPT-2's Conv1D, some experts)."""
    return module.transposed if isinstance(module, Expert) else isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> Float[Tensor, "rows columns"]:
    """Return a view of the weight as [rows, columns]."""
    weight = module.weight.data
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(module) else weight


def set_weight(module: nn.Module, weight: Float[Tensor, "rows columns"]) -> None:
    """Replace the module's weight by `weight`."""
    module.weight.data = weight.t() if is_transposed(module) else weight


@contextmanager
def forwards(modules: Iterator[nn.Module], wrap: Callable[[int, nn.Module], Callable[..., object]]) -> Iterator[None]:
    """Replace the modules' forwards by `wrap(index, module)` and restore them on exit.

    The forward is replaced on the instance; the module stays in its list, because models read its attributes.
    """
    patched = []
    try:
        for index, module in enumerate(modules):
            module.forward = wrap(index, module)
            patched.append(module)
        yield
    finally:
        for module in patched:
            del module.forward


def _same(first: object, second: object) -> bool:
    """Return whether two nested structures of block arguments are equal, comparing tensors by value."""
    leaves, structure = tree_flatten(first)
    others, other_structure = tree_flatten(second)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(leaves, others, strict=True)
    )


class Stream:
    """A model that runs in steps: embedding (`start`), one block at a time (`block`), final norm and head (`finish`).

    The three in order equal the model's own forward bit for bit.
    """

    def __init__(
        self, model: PreTrainedModel, present: range | None = None, offload_to: torch.device | None = None
    ) -> None:
        """Take over `model`, of which the blocks `present` (None: all) have weights; the others can only be skipped.

        With `offload_to` the blocks stay on the host and are copied to this device one at a time; the rest of the model
        moves there.
        """
        self.model = model
        self.blocks_name, self.blocks = find_blocks(model)
        self._first = 0 if present is None else present.start
        split_experts(model, self.blocks)
        self._offload: OffloadedBlocks | None = None
        if offload_to is not None:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if not name.startswith(f"{self.blocks_name}."):
                    tensor.data = tensor.data.to(offload_to)
            self._offload = OffloadedBlocks(self.blocks, present or range(len(self.blocks)), offload_to)
        self._calls: dict[tuple[int, ...], tuple[Call, ...]] = {}
        self._returns_tuple = self._first_block_returns_tuple()

    def resident(self, index: int, *, then: int | None = None) -> AbstractContextManager[None]:
        """Keep block `index` on the device within the context; `then` is the block to prefetch."""
        return nullcontext() if self._offload is None else self._offload.resident(index, then=then)

    def twin(self) -> "Stream":
        """Return a copy whose modules can use other weights while this one runs; both share all tensors' memory."""
        assert self._offload is None, "offloaded blocks cannot be shared"
        tensors = [*self.model.parameters(), *self.model.buffers()]
        tensors += [expert.weight for module in self.model.modules() for expert in experts_of(module).values()]
        memo: dict[int, object] = {
            id(tensor): nn.Parameter(tensor.data, requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
            for tensor in tensors
        }
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model, memo)
        _, other.blocks = find_blocks(other.model)
        return other

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @torch.no_grad()
    def start(self, tokens: Int64[Tensor, "sequences length"]) -> Recording:
        """Embed `tokens` and record the arguments of every block; texts of the same shape share equal arguments."""
        received: list[Tensor] = []
        calls: list[Call] = []

        def record(index: int, block: nn.Module) -> Callable[..., object]:
            def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
                received.append(hidden_states)
                calls.append((args, kwargs))
                return self._returned(hidden_states)

            return forward

        with forwards(iter(self.blocks), record):
            self._run_base(tokens)
        if len(calls) != len(self.blocks) or any(hidden is not received[0] for hidden in received):
            raise UnsupportedModel(
                f"--model: {type(self.model).__name__} does more between its blocks than pass hidden states on"
            )
        kept = self._calls.setdefault(tuple(tokens.shape), tuple(calls))
        return Recording(received[0], kept if _same(kept, tuple(calls)) else tuple(calls))

    @torch.no_grad()
    def block(self, index: int, recording: Recording) -> Recording:
        """Run block `index` and return the hidden states after it."""
        args, kwargs = recording.calls[index]
        with self.resident(index):
            output = self.blocks[index](recording.hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return Recording(hidden, recording.calls)

    @torch.no_grad()
    def finish(
        self, tokens: Int64[Tensor, "sequences length"], recording: Recording
    ) -> Float[Tensor, "sequences length vocabulary"]:
        """Return the model's logits for `tokens`, given `recording.hidden` as the output of the last block."""

        def skip(index: int, block: nn.Module) -> Callable[..., object]:
            def forward(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
                last = index == len(self.blocks) - 1
                return self._returned(recording.hidden if last else hidden_states)

            return forward

        with forwards(iter(self.blocks), skip):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def _returned(self, hidden: Tensor) -> object:
        return (hidden, None) if self._returns_tuple else hidden

    def _run_base(self, tokens: Tensor) -> None:
        with refusals():
            self.model.base_model(input_ids=tokens, use_cache=False)

    @torch.no_grad()
    def _first_block_returns_tuple(self) -> bool:
        """Run a block on the embeddings of two tokens and return whether its output is a tuple."""
        outputs: list[object] = []
        present = self.blocks[self._first]

        class Stop(Exception):
            """Signal the end of the run after the first block."""

        def observe(index: int, block: nn.Module) -> Callable[..., object]:
            own = functools.partial(type(present).forward, present)

            def forward(*args: object, **kwargs: object) -> object:
                outputs.append(own(*args, **kwargs))
                raise Stop

            return forward

        tokens = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        try:
            with self.resident(self._first), forwards(iter(self.blocks), observe):
                self._run_base(tokens)
        except Stop:
            return isinstance(outputs[0], tuple)
        raise UnsupportedModel(f"--model: {type(self.model).__name__} does not run its blocks")
