"""How does each expert of a stack, held by transformers as a slice of a 3-D parameter, become a linear of its own?

The experts' module keeps its own forward, run under a mode that watches what it does with its 3-D parameters: an
indexing by one expert gives the weight of that expert's linear, a product with it calls the linear. Hooks fire, and
another weight put into the linear takes effect. Anything else that is done with such a parameter is refused.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from neuronal_ray.cli.errors import UnsupportedModel

_PRODUCTS = (torch.matmul, Tensor.matmul)
_METADATA = (Tensor.size, *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "dtype", "device")))


class Expert(nn.Module):
    """One expert's matrix in the 3-D parameter `stack`: a linear without bias whose weight is a view of the slice.

    `transposed`: the weight is [input columns, output rows].
    """

    def __init__(self, weight: Float[Tensor, "..."], *, stack: str, index: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.stack, self.index, self.transposed = stack, index, transposed

    @property
    def path(self) -> str:
        """Path inside the experts' module: that which it would have were each expert a module."""
        return f"{self.index}.{self.stack}"

    def forward(self, inputs: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """The product; the expert's bias, if any, is added by the module's own code."""
        return inputs @ self.weight if self.transposed else functional.linear(inputs, self.weight)


class _SplitForward:
    """The forward of an experts' module whose products with single experts are calls of linears."""

    def __init__(self, module: nn.Module, experts: Sequence[Expert]) -> None:
        self.module, self.experts = module, tuple(experts)
        self.by_stack = {expert.stack: [one for one in experts if one.stack == expert.stack] for expert in experts}

    def __call__(self, *args: object, **kwargs: object) -> object:
        stacks = {name: self.module.get_parameter(name) for name in self.by_stack}
        for name, stack in stacks.items():
            weight = self.by_stack[name][0].weight
            assert (weight.device, weight.dtype) == (stack.device, stack.dtype), "moved after its experts were split"
        with _Watch(type(self.module).__name__, stacks, self.by_stack):
            return type(self.module).forward(self.module, *args, **kwargs)


class _Watch(TorchFunctionMode):
    """Stands between a forward and its 3-D parameters, for one call."""

    def __init__(self, kind: str, stacks: dict[str, nn.Parameter], experts: dict[str, list[Expert]]) -> None:
        super().__init__()
        self._kind, self._experts = kind, experts
        self._names = {id(stack): name for name, stack in stacks.items()}
        self._taken: dict[int, Expert] = {}

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Iterable[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        stacks = [self._names[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._names]
        taken = [self._taken[id(value)] for value in (*args, *kwargs.values()) if id(value) in self._taken]
        if func in _METADATA or not (stacks or taken):
            return func(*args, **kwargs)
        index = _one(args[1]) if stacks and func is Tensor.__getitem__ else None
        if index is not None:
            expert = self._experts[stacks[0]][index]
            self._taken[id(expert.weight)] = expert
            return expert.weight
        if taken and len(args) == 2 and not kwargs and args[1] is taken[0].weight:
            products = _PRODUCTS if taken[0].transposed else (functional.linear,)
            if func in products:
                return taken[0](args[0])
        name = stacks[0] if stacks else taken[0].stack
        raise UnsupportedModel(
            f"--model: {self._kind} passes the experts of {name} to {func.__name__}; only experts that are multiplied "
            "one at a time can be pruned"
        )


def _one(index: object) -> int | None:
    """The number of the slice if the index, a number or a tensor of no dimensions, takes just one."""
    if isinstance(index, int):
        return index
    return int(index) if isinstance(index, Tensor) and index.dim() == 0 else None


def _is_stack(module: nn.Module) -> bool:
    """Return whether the module itself holds 3-D parameters of equally many slices and is no convolution."""
    lengths = {parameter.shape[0] for parameter in module.parameters(recurse=False) if parameter.dim() == 3}
    return len(lengths) == 1 and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)


def split_experts(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Give each expert in the blocks a linear of its own; what is split already stays as it is.

    To be called when the model has its final dtype and device. The linears are attributes of the experts' module,
    named by the expert's index, but no registered children: parameters and state dict stay the model's own.
    """
    stacks = [module for block in blocks for name, module in block.named_modules() if name and _is_stack(module)]
    if not stacks:
        return
    model.set_experts_implementation("eager")  # the others multiply all experts at once
    for module in stacks:
        if not isinstance(module.forward, _SplitForward):
            _split(module)


def _split(module: nn.Module) -> None:
    stacks = {name: stack for name, stack in module.named_parameters(recurse=False) if stack.dim() == 3}
    # transformers' decorator of experts says which layout their eager forward uses; running it verifies that
    transposed = bool(vars(module).get("is_transposed", False))
    experts: list[Expert] = []
    for index in range(len(next(iter(stacks.values())))):
        one = [
            Expert(stack.data[index], stack=name, index=index, transposed=transposed) for name, stack in stacks.items()
        ]
        vars(module)[str(index)] = nn.ModuleDict({expert.stack: expert for expert in one})
        experts += one
    module.forward = _SplitForward(module, experts)


def experts_of(module: nn.Module) -> dict[str, Expert]:
    """The linears of an experts' module that was split, by path inside it; none for any other module."""
    split = module.forward
    return {expert.path: expert for expert in split.experts} if isinstance(split, _SplitForward) else {}


def stack_name(name: str, expert: Expert) -> str:
    """The name of the 3-D parameter for the `name` of the weight of one expert's linear."""
    return name.removesuffix(f"{expert.path}.weight") + expert.stack
