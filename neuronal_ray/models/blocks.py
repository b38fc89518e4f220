"""The blocks of any decoder of transformers: find them, record their arguments, replay them one at a time."""

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

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.models.experts import Expert, experts_of, split_experts
from neuronal_ray.models.offload import Residence

Model = PreTrainedModel
Call = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True)
class Recording:
    """The hidden states of a text between two blocks, and the other arguments that each block is called with."""

    hidden: Float[Tensor, "sequences tokens features"]
    calls: tuple[Call, ...]


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of the transformer blocks: the one ModuleList as long as the text config says."""
    num_blocks = model.config.get_text_config().num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks
    ]
    if len(found) != 1:
        raise UnsupportedModel(
            f"--model: expected one list of {num_blocks} transformer blocks in {type(model).__name__}, "
            f"found {len(found)}: {', '.join(name for name, _ in found) or 'none'}"
        )
    return found[0]


def find_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The prunable linears of a block by path. Raises UnsupportedModel for weights that would be missed.

    Experts held as 3-D parameters are linears of their own once `split_experts` has run; routers that are plain
    parameters are no linears, a router that is an nn.Linear cannot be told from one and is pruned.
    """
    linears: dict[str, nn.Module] = {}
    split: set[str] = set()
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            linears[path] = module
        for inner, expert in experts_of(module).items():
            linears[f"{path}.{inner}"] = expert
            split.add(f"{path}.{expert.stack}")
    for name, parameter in block.named_parameters():
        if parameter.dim() >= 3 and name not in split:
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


def is_transposed(module: nn.Module) -> bool:
    """Return whether the module keeps its weight as [input columns, output rows] (GPT-2's Conv1D, some experts)."""
    return module.transposed if isinstance(module, Expert) else isinstance(module, Conv1D)


def weight_of(module: nn.Module) -> Float[Tensor, "rows columns"]:
    """The weight as [output rows, input columns], a view."""
    weight = module.weight.data
    assert isinstance(weight, Tensor)
    return weight.t() if is_transposed(module) else weight


def set_weight(module: nn.Module, weight: Float[Tensor, "rows columns"]) -> None:
    """Put `weight` in place of the module's own."""
    module.weight.data = weight.t() if is_transposed(module) else weight


@contextmanager
def forwards(modules: Iterator[nn.Module], wrap: Callable[[int, nn.Module], Callable[..., object]]) -> Iterator[None]:
    """Run the modules through `wrap(index, module)` in place of their own forward, restored on exit.

    The forward is replaced on the instance, not the module in its list: models read attributes of their blocks.
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


def _same(one: object, other: object) -> bool:
    """Return whether two nests of block arguments are equal, tensors by value."""
    leaves, structure = tree_flatten(one)
    others, other_structure = tree_flatten(other)
    return structure == other_structure and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(leaves, others, strict=True)
    )


class Stream:
    """A model taken apart: embedding (`start`), blocks (`block`), final norm and head (`finish`).

    Composed, the three equal the model's own forward bit for bit.
    """

    def __init__(
        self, model: PreTrainedModel, present: range | None = None, visiting: torch.device | None = None
    ) -> None:
        """`present` are the blocks that have weights, all if absent; the others can be passed by, not run.

        `visiting`: they stay on the host and come to this device one at a time; the rest of the model moves there.
        """
        self.model = model
        self.blocks_name, self.blocks = find_blocks(model)
        self._first = 0 if present is None else present.start
        split_experts(model, self.blocks)
        self._residence: Residence | None = None
        if visiting is not None:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if not name.startswith(f"{self.blocks_name}."):
                    tensor.data = tensor.data.to(visiting)
            self._residence = Residence(self.blocks, present or range(len(self.blocks)), visiting)
        self._calls: dict[tuple[int, ...], tuple[Call, ...]] = {}
        self._returns_tuple = self._first_block_returns_tuple()

    def resident(self, index: int, *, then: int | None = None) -> AbstractContextManager[None]:
        """Block `index` is on the device while this lasts, and will be followed by block `then`."""
        return nullcontext() if self._residence is None else self._residence.at(index, then=then)

    def twin(self) -> "Stream":
        """Another whose modules can take other weights while this one runs; both share the memory of all tensors."""
        assert self._residence is None, "blocks that visit have one place"
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
        """Number of logits of a position."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @torch.no_grad()
    def start(self, tokens: Int64[Tensor, "sequences length"]) -> Recording:
        """Embed `tokens` and record the arguments of every block (texts of one shape share them, if they are equal)."""
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
        """The hidden states after block `index`."""
        args, kwargs = recording.calls[index]
        with self.resident(index):
            output = self.blocks[index](recording.hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return Recording(hidden, recording.calls)

    @torch.no_grad()
    def finish(
        self, tokens: Int64[Tensor, "sequences length"], recording: Recording
    ) -> Float[Tensor, "sequences length vocabulary"]:
        """The logits that the model gives for `tokens` when its last block returns `recording.hidden`."""

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
        self.model.base_model(input_ids=tokens, use_cache=False)

    @torch.no_grad()
    def _first_block_returns_tuple(self) -> bool:
        """Run a block on two tokens' embeddings, for the type that blocks return."""
        outputs: list[object] = []
        present = self.blocks[self._first]

        class Stop(Exception):
            """Ends the run after the first block."""

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
