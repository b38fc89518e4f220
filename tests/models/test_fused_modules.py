"""A kernel replaces exactly the modules that compute the same, in every family."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from neuronal_ray.core.kernels.gate import gated_reference
from neuronal_ray.core.kernels.norm import RmsNorm, rms_norm_reference
from neuronal_ray.core.kernels.rotary import rotary_reference
from neuronal_ray.models import fused_gates as gates
from neuronal_ray.models import fused_modules as fused
from neuronal_ray.models.blocks import Stream

MakeModel = Callable[..., PreTrainedModel]
NORMS = {  # of a block, seen on its values; the others are LayerNorms, which torch has in one kernel
    "llama": 2,
    "mistral": 2,
    "phi3": 2,
    "qwen2": 2,
    "qwen3": 4,
    "gemma2": 4,
    "gemma3_text": 6,
    "olmo2": 4,
    "mixtral": 2,
    "gpt_oss": 2,
    "deepseek_v3": 4,
}
GATED = {"llama", "mistral", "phi3", "qwen2", "qwen3", "olmo2", "stablelm", "mixtral", "deepseek_v3"}
UNTURNED = {
    "opt",
    "gpt2",
    "falcon_alibi",
    "gpt_neox",
}  # positions are embedded otherwise; gpt_neox turns a part of a head


@pytest.fixture
def kernels_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the kernels by their references on this device; list those that were called."""
    called: list[str] = []

    def rms_norm(inputs: torch.Tensor, weight: torch.Tensor, form: RmsNorm) -> torch.Tensor:
        called.append("norm")
        return rms_norm_reference(inputs, weight, form)

    def rotary(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        called.append("rotary")
        return rotary_reference(states, cos, sin)

    def fits(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        return cos.shape[1:] == (states.shape[2], states.shape[3]) and states.dtype == cos.dtype == sin.dtype

    def gated(inputs: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        called.append("gate")
        return gated_reference(inputs, values)

    monkeypatch.setattr(gates, "gated", gated)
    monkeypatch.setattr(gates, "gate_takes", lambda one, other: one.shape == other.shape)
    monkeypatch.setattr(fused, "rms_norm", rms_norm)
    monkeypatch.setattr(fused, "rotary", rotary)
    monkeypatch.setattr(fused, "norm_takes", lambda inputs, weight: inputs.dtype == weight.dtype)
    monkeypatch.setattr(fused, "rotary_takes", fits)
    return called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_family_computes_the_same(
    family: str, dtype: torch.dtype, make_model: MakeModel, kernels_on_a_cpu: list[str]
) -> None:
    stream = Stream(make_model(family).to(dtype))
    before = stream.block(1, stream.start(torch.arange(24).view(2, 12) + 3))
    found = fused.fuse(stream.blocks[1])
    assert len([path for path in found if "norm" in path]) == NORMS.get(family, 0), found
    after = stream.block(1, stream.start(torch.arange(24).view(2, 12) + 3))
    assert torch.equal(before.hidden, after.hidden)
    assert kernels_on_a_cpu.count("norm") == NORMS.get(family, 0)
    wide_angles = family == "olmo2" and dtype == torch.bfloat16  # they are float32 whatever the states are
    assert kernels_on_a_cpu.count("gate") == (family in GATED)
    assert ("rotary" in kernels_on_a_cpu) == (family not in UNTURNED and not wide_angles)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_mixtures_of_experts_too(name: str, make_model: MakeModel, kernels_on_a_cpu: list[str]) -> None:
    stream = Stream(make_model(name))
    before = stream.block(1, stream.start(torch.arange(24).view(2, 12) + 3))
    fused.fuse(stream.blocks[1])
    after = stream.block(1, stream.start(torch.arange(24).view(2, 12) + 3))
    assert torch.equal(before.hidden, after.hidden)
    assert kernels_on_a_cpu.count("norm") == NORMS[name]
    assert ("gate" in kernels_on_a_cpu) == (name in GATED)


def test_without_a_kernel_for_them_modules_run_their_own_code(make_model: MakeModel) -> None:
    stream = Stream(make_model("llama"))
    before = stream.block(1, stream.start(torch.arange(12)[None] + 3))
    assert fused.fuse(stream.blocks[1])
    assert torch.equal(stream.block(1, stream.start(torch.arange(12)[None] + 3)).hidden, before.hidden)


def test_another_model_of_the_family_is_left_alone(make_model: MakeModel, kernels_on_a_cpu: list[str]) -> None:
    fused.fuse(Stream(make_model("llama")).blocks[1])
    make_model("llama")(input_ids=torch.arange(12)[None])
    assert kernels_on_a_cpu == []


class Scaled(nn.Module):
    """A normalization that no kernel computes: by the mean of the magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.weight * inputs / (inputs.abs().mean(dim=-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("module", [Scaled(), nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.Linear(8, 1), nn.SiLU()])
def test_other_modules_stay(module: nn.Module) -> None:
    assert fused.norm_form(module) is None


class PlusOne(nn.Module):
    """One form, with another float attribute next to its epsilon."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(0)))
        self.scale, self.eps = 0.5, 1e-3

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        normed = inputs * torch.rsqrt(inputs.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (1.0 + self.weight)


def test_the_form_of_a_normalization_is_found() -> None:
    form = fused.norm_form(PlusOne())
    assert form is not None
    assert (form.eps, form.plus_one) == (1e-3, True)


def test_a_rotary_embedding_of_neighbours_is_none_of_halves() -> None:
    def neighbours(
        queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        def turn(states: torch.Tensor) -> torch.Tensor:
            turned = torch.stack((-states[..., 1::2], states[..., ::2]), dim=-1).flatten(-2)
            return states * cos[:, None] + turned * sin[:, None]

        return turn(queries), turn(keys)

    assert not fused.is_rotary(neighbours)
    assert not fused.is_rotary(lambda queries, keys: (queries, keys))
    assert fused.is_rotary(
        lambda queries, keys, cos, sin: (rotary_reference(queries, cos, sin), rotary_reference(keys, cos, sin))
    )
