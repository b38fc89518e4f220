"""Experts in 3-D parameters behave as linears of their own, without changing their model."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import PreTrainedModel

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.models.blocks import Stream, find_linears, is_transposed, set_weight, weight_of
from neuronal_ray.models.experts import Expert, experts_of, split_experts, stack_name

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]

TEXT = torch.arange(3, 63).reshape(5, 12)  # [sequences, tokens]
NUM_EXPERTS = 4


@pytest.fixture(scope="module")
def stream(moe_family: str, make_model: MakeModel) -> Stream:
    return Stream(make_model(moe_family))


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TEXT, use_cache=False).logits
    return logits


def experts_module(stream: Stream) -> nn.Module:
    """Return the experts' module of block 1."""
    (found,) = (module for module in stream.blocks[1].modules() if experts_of(module))
    return found


def experts_in(stream: Stream) -> dict[str, Expert]:
    """Return the linears of experts in block 1, by path."""
    return {path: module for path, module in find_linears(stream.blocks[1]).items() if isinstance(module, Expert)}


def test_the_logits_are_the_models_own(moe_family: str, stream: Stream, make_model: MakeModel) -> None:
    untouched = make_model(moe_family)
    untouched.set_experts_implementation("eager")
    own = logits_of(untouched)
    assert not any(experts_of(module) for module in untouched.modules())
    assert torch.equal(logits_of(stream.model), own)
    recording = stream.start(TEXT)
    for index in range(len(stream.blocks)):
        recording = stream.block(index, recording)
    assert torch.equal(stream.finish(TEXT, recording), own)


def test_every_expert_has_its_linears(stream: Stream) -> None:
    stacks = dict(experts_module(stream).named_parameters(recurse=False))
    stacks = {name: stack for name, stack in stacks.items() if stack.dim() == 3}
    linears = experts_in(stream)
    assert len(linears) == 2 * NUM_EXPERTS
    for index in range(NUM_EXPERTS):
        for name, stack in stacks.items():
            (path,) = (path for path in linears if path.endswith(f".experts.{index}.{name}"))
            slice_ = stack[index].t() if is_transposed(linears[path]) else stack[index]
            own = weight_of(linears[path])
            assert (own.data_ptr(), own.shape, own.stride()) == (slice_.data_ptr(), slice_.shape, slice_.stride())
            assert stream.blocks[1].get_submodule(path) is linears[path]
    hidden = stream.start(TEXT).hidden.shape[-1]
    assert all(weight_of(linear).shape[1] == hidden for path, linear in linears.items() if "gate_up" in path)
    assert all(weight_of(linear).shape[0] == hidden for path, linear in linears.items() if "down" in path)


def test_another_weight_takes_effect_until_it_is_taken_out(
    moe_family: str, stream: Stream, make_model: MakeModel
) -> None:
    dense = logits_of(stream.model)
    for path, linear in experts_in(stream).items():
        own = weight_of(linear)
        assert isinstance(linear, Expert)
        changed = own * (torch.arange(own.shape[1]) % 3 > 0)
        set_weight(linear, changed)
        with_other = logits_of(stream.model)
        set_weight(linear, own)
        reference = make_model(moe_family)
        reference.set_experts_implementation("eager")
        name = stack_name(f"{stream.blocks_name}.1.{path}.weight", linear)
        reference.get_parameter(name).data[linear.index] = changed.t() if linear.transposed else changed
        assert torch.equal(with_other, logits_of(reference)), path
        assert not torch.equal(with_other, dense), path
        assert torch.equal(logits_of(stream.model), dense), path


def test_hooks_see_exactly_the_tokens_routed_to_the_expert(stream: Stream) -> None:
    chosen: list[torch.Tensor] = []
    seen: dict[str, int] = {}

    def note_choice(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        chosen.extend(value for value in (*args, *kwargs.values()) if not value.is_floating_point())

    def note(path: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        return lambda _, args: seen.update({path: len(args[0])})

    linears = experts_in(stream)
    handles = [linear.register_forward_pre_hook(note(path)) for path, linear in linears.items()]
    handles.append(experts_module(stream).register_forward_pre_hook(note_choice, with_kwargs=True))
    recording = stream.start(TEXT)
    stream.block(1, recording)
    for handle in handles:
        handle.remove()
    (choice,) = chosen  # [tokens, experts per token]
    routed = torch.bincount(choice.flatten(), minlength=NUM_EXPERTS).tolist()
    assert sum(routed) == 2 * TEXT.numel()
    assert {path: seen.get(path, 0) for path in linears} == {
        path: routed[linear.index] for path, linear in linears.items()
    }


def test_functional_call_reaches_experts(stream: Stream) -> None:
    """Gradients of a block's output in the weights of its linears need their paths to be names of parameters."""
    recording = stream.start(TEXT)
    dense = stream.block(1, recording).hidden
    path, linear = max(experts_in(stream).items())
    weight = linear.weight.detach().clone().requires_grad_()
    args, kwargs = recording.calls[1]
    output = functional_call(stream.blocks[1], {f"{path}.weight": weight}, (recording.hidden, *args), kwargs)
    hidden = output[0] if isinstance(output, tuple) else output
    assert torch.equal(hidden.detach(), dense)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), weight)
    assert gradient.abs().max() > 0
    assert torch.equal(stream.block(1, recording).hidden, dense)


def test_parameters_stay_the_models_own(moe_family: str, stream: Stream, make_model: MakeModel) -> None:
    untouched = make_model(moe_family)
    for names in (
        lambda model: [name for name, _ in model.named_parameters()],
        lambda model: list(model.state_dict()),
        lambda model: [name for name, _ in model.named_modules()],
    ):
        assert names(stream.model) == names(untouched)


def test_split_experts_are_not_split_again(stream: Stream) -> None:
    before = experts_in(stream)
    split_experts(stream.model, stream.blocks)
    assert all(linear is before[path] for path, linear in experts_in(stream).items())


def test_a_copy_has_experts_of_its_own(make_model: MakeModel) -> None:
    stream = Stream(make_model("mixtral"))
    other = Stream(copy.deepcopy(stream.model))
    dense = logits_of(stream.model)
    for linear in experts_in(other).values():
        set_weight(linear, torch.zeros_like(weight_of(linear)))
    assert torch.equal(logits_of(stream.model), dense)
    assert not torch.equal(logits_of(other.model), dense)


def test_a_model_changed_after_its_experts_were_split_does_not_run(make_model: MakeModel) -> None:
    stream = Stream(make_model("mixtral"))
    stream.model.to(torch.bfloat16)
    with pytest.raises(AssertionError, match="moved after its experts were split"):
        logits_of(stream.model)


# -- what is refused


class Stack(nn.Module):
    """Two experts of 32 features in a 3-D parameter, in a form to be chosen."""

    def __init__(self, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], *slices: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*(slices or (2,)), 32, 32))
        self.use = use

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.use(hidden, self.weight)


def refusal(model: PreTrainedModel, stack: nn.Module) -> str:
    """Return the one line with which a LLaMA whose feed-forward is `stack` is refused."""
    for block in model.model.layers:
        block.mlp = stack
    with pytest.raises(UnsupportedModel, match=r"^--model: ") as error:
        find_linears(Stream(model).blocks[0])
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    ("use", "name"),
    [
        (lambda hidden, weight: torch.einsum("std,eod->sto", hidden, weight), "einsum"),
        (lambda hidden, weight: hidden @ weight.sum(0), "sum"),
        (lambda hidden, weight: functional.linear(hidden, weight[0].double().float()), "double"),
        (lambda hidden, weight: hidden @ weight[0], "matmul"),  # not declared as transposed
        (lambda hidden, weight: functional.linear(hidden, weight[0:1][0]), "__getitem__"),
        (lambda hidden, weight: functional.linear(hidden, weight[0], torch.ones(32)), "linear"),
        (lambda hidden, weight: functional.linear(hidden, weight.to(hidden.dtype)[0]), "to"),
    ],
)
def test_other_uses_of_experts_are_refused(
    make_model: MakeModel, use: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], name: str
) -> None:
    assert f"Stack passes the experts of weight to {name};" in refusal(make_model("llama"), Stack(use))


def test_four_dimensions_and_convolutions_are_refused(make_model: MakeModel) -> None:
    assert "(2, 2, 32, 32) weights as one parameter" in refusal(make_model("llama"), Stack(torch.matmul, 2, 2))
    assert "weights as one parameter (convolution" in refusal(
        make_model("llama"), nn.Conv1d(2, 2, 1)
    )  # the first run has 2 tokens


def test_shape_and_dtype_may_be_read(make_model: MakeModel) -> None:
    def use(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        assert weight.shape[0] == weight.size(0) == 2
        return functional.linear(hidden.to(weight.dtype).to(weight.device), weight[torch.tensor(1)])

    model = make_model("llama")
    for block in model.model.layers:
        block.mlp = Stack(use)
    found = find_linears(Stream(model).blocks[0])
    assert [path for path in found if path.startswith("mlp")] == ["mlp.0.weight", "mlp.1.weight"]
