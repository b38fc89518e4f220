"""A lazy activation behaves as the tensor that it stands for, and its product uses the kernel."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from neuronal_ray.core.kernels.gate import gated_reference
from neuronal_ray.models import fused_gates as gates
from neuronal_ray.models.fused_gates import LazySilu, is_silu

SOURCE = torch.Generator().manual_seed(0)
INPUTS, VALUES = (torch.randn(2, 3, 4, generator=SOURCE) for _ in range(2))
WEIGHT = torch.randn(5, 4, generator=SOURCE)


@pytest.mark.parametrize("name", ["silu", "swish"])
def test_the_activation_is_recognized_by_its_values(name: str) -> None:
    assert is_silu(ACT2FN[name])


@pytest.mark.parametrize(
    "module",
    [
        *(ACT2FN[name] for name in ("gelu", "gelu_pytorch_tanh", "relu", "sigmoid", "quick_gelu", "mish")),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.Linear(4, 4),
        nn.Sequential(nn.SiLU()),
        nn.MultiheadAttention(4, 1),
    ],
    ids=lambda module: type(module).__name__,
)
def test_no_other_activation_is_recognized(module: nn.Module) -> None:
    assert not is_silu(module)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Replace the kernel by its definition on this device; list the shapes of the products that it computes."""
    asked: list[tuple[int, ...]] = []

    def gated(one: Tensor, other: Tensor) -> Tensor:
        asked.append(tuple(one.shape))
        return gated_reference(one, other)

    monkeypatch.setattr(gates, "gated", gated)
    monkeypatch.setattr(gates, "gate_takes", lambda one, other: one.shape == other.shape)
    return asked


PRODUCTS: list[Callable[[Tensor], Tensor]] = [
    lambda opened: opened * VALUES,
    lambda opened: VALUES * opened,
    lambda opened: torch.mul(opened, VALUES),
    lambda opened: torch.mul(VALUES, opened),
    lambda opened: VALUES.mul(opened),
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_product_is_the_kernels(product: Callable[[Tensor], Tensor], products: list[tuple[int, ...]]) -> None:
    found = product(LazySilu(INPUTS))
    assert torch.equal(found, product(F.silu(INPUTS)))
    assert products == [(2, 3, 4)]


@pytest.mark.parametrize(
    "use",
    [
        lambda opened: opened * 2.0,
        lambda opened: VALUES[:1] * opened,
        lambda opened: opened + VALUES,
        lambda opened: 1 - opened / 2 + (-opened) ** 2,
        lambda opened: opened @ WEIGHT.t(),
        lambda opened: torch.stack(list(opened)) + len(opened),
        lambda opened: VALUES - opened,
        lambda opened: F.linear(opened, WEIGHT),
        lambda opened: F.linear(input=opened, weight=WEIGHT),
        lambda opened: F.dropout(opened, 0.5, training=False),
        lambda opened: torch.cat([opened, VALUES], dim=-1),
        lambda opened: torch.mul(opened, VALUES, out=torch.empty(2, 3, 4)),
        lambda opened: VALUES.clone().mul_(opened),
        lambda opened: opened.reshape(6, 4).sum(dim=0),
        lambda opened: opened[0],
        lambda opened: torch.tensor([opened.dim(), *opened.shape]),
    ],
)
def test_any_other_use_sees_the_tensor(use: Callable[[Tensor], Tensor], products: list[tuple[int, ...]]) -> None:
    assert torch.equal(use(LazySilu(INPUTS)), use(F.silu(INPUTS)))
    assert not products


def test_it_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    own = F.silu
    monkeypatch.setattr(gates.F, "silu", lambda inputs: calls.append(1) or own(inputs))
    waiting = LazySilu(INPUTS)
    assert not calls
    assert torch.equal(waiting + 1, waiting.add(1))
    assert calls == [1]


def test_its_gradient_is_silus() -> None:
    inputs = INPUTS.clone().requires_grad_()
    (LazySilu(inputs) * VALUES).sum().backward()
    expected = INPUTS.clone().requires_grad_()
    (F.silu(expected) * VALUES).sum().backward()
    assert torch.equal(inputs.grad, expected.grad)
