"""Experts as linears: each slice of a 3-D parameter of transformers becomes a module of its own.

The experts' module keeps its forward, which runs under a mode that intercepts the use of its 3-D parameters: indexing
by one expert returns the weight of that expert's linear, and a product with that weight calls the linear. So hooks
fire, and replacing the linear's weight takes effect. Any other use of such a parameter is refused.
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

    `transposed`: the weight is [columns, rows].
    """

    def __init__(self, weight: Float[Tensor, "..."], *, stack: str, index: int, transposed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.stack, self.index, self.transposed = stack, index, transposed

    @property
    def path(self) -> str:
        """Path inside the experts' module, as if each expert were a module."""
        return f"{self.index}.{self.stack}"

    def forward(self, inputs: Float[Tensor, "tokens columns"]) -> Float[Tensor, "tokens rows"]:
        """Multiply by the weight; the experts' module adds the bias, if any."""
        return inputs @ self.weight if self.transposed else functional.linear(inputs, self.weight)


class _SplitForward:
    """The forward of an experts' module in which products with single experts call their linears."""

    def __init__(self, module: nn.Module, experts: Sequence[Expert]) -> None:
        self.module, self.experts = module, tuple(experts)
        self.by_stack: dict[str, list[Expert]] = {}
        for expert in experts:
            self.by_stack.setdefault(expert.stack, []).append(expert)

    def __call__(self, *args: object, **kwargs: object) -> object:
        stacks = {name: self.module.get_parameter(name) for name in self.by_stack}
        for name, stack in stacks.items():
            weight = self.by_stack[name][0].weight
            assert (weight.device, weight.dtype) == (stack.device, stack.dtype), "moved after its experts were split"
        with _Interception(type(self.module).__name__, stacks, self.by_stack):
            return type(self.module).forward(self.module, *args, **kwargs)


class _Interception(TorchFunctionMode):
    """Intercepts the use of 3-D parameters during one call of a forward."""

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
        index = _single_index(args[1]) if stacks and func is Tensor.__getitem__ else None
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


def _single_index(index: object) -> int | None:
    """Return the number of the slice if the index, a number or a 0-D tensor, selects a single one; else None."""
    if isinstance(index, int):
        return index
    return int(index) if isinstance(index, Tensor) and index.dim() == 0 else None


def is_matrices(parameter: Tensor) -> bool:
    """Return whether a parameter is a stack of matrices: 3-D or more, and no vector in all but its shape."""
    return parameter.dim() >= 3 and not is_vector(parameter)


def is_vector(parameter: Tensor) -> bool:
    """Return whether all but one of a parameter's sizes are 1."""
    return parameter.numel() == max(parameter.shape, default=1)


def _is_stack(module: nn.Module) -> bool:
    """Return whether the module itself holds 3-D parameters of equally many slices, and is no convolution."""
    lengths = {stack.shape[0] for stack in module.parameters(recurse=False) if stack.dim() == 3 and is_matrices(stack)}
    return len(lengths) == 1 and not isinstance(module, nn.Conv1d | nn.ConvTranspose1d)


def split_experts(model: PreTrainedModel, blocks: nn.ModuleList) -> None:
    """Give each expert in the blocks a linear of its own, unless it has one.

    Call it when the model has its final dtype and device. The linears are attributes of the experts' module, named by
    the expert's index, but not registered as children: the model's parameters and state dict do not change.
    """
    stacks = [module for block in blocks for name, module in block.named_modules() if name and _is_stack(module)]
    if not stacks:
        return
    model.set_experts_implementation("eager")  # the other implementations multiply all experts at once
    for module in stacks:
        if not isinstance(module.forward, _SplitForward):
            _split(module)


def _split(module: nn.Module) -> None:
    stacks = {
        name: stack for name, stack in module.named_parameters(recurse=False) if stack.dim() == 3 and is_matrices(stack)
    }
    # transformers' decorator of experts sets the layout that their eager forward uses; running it verifies that
    transposed = bool(vars(module).get("is_transposed", False))
    experts: list[Expert] = []
    for index in range(len(next(iter(stacks.values())))):
        linears = {
            name: Expert(stack.data[index], stack=name, index=index, transposed=transposed)
            for name, stack in stacks.items()
        }
        vars(module)[str(index)] = nn.ModuleDict(linears)
        experts += linears.values()
    module.forward = _SplitForward(module, experts)


def experts_of(module: nn.Module) -> dict[str, Expert]:
    """Return the linears of a split experts' module by path inside it; empty for any other module."""
    split = module.forward
    return {expert.path: expert for expert in split.experts} if isinstance(split, _SplitForward) else {}


def stack_name(name: str, expert: Expert) -> str:
    """Return the name of the 3-D parameter that contains the expert's weight called `name`."""
    return name.removesuffix(f"{expert.path}.weight") + expert.stack
