"""The layout of a model: the same for any weights and precision, and refused where it cannot be measured."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from wirings import FUSED, TRUTHS, as_sets, measured_sources

from neuronal_ray.cli.errors import UnsupportedModel
from neuronal_ray.core.layout import Linear
from neuronal_ray.models.blocks import Stream
from neuronal_ray.models.routers import keep_routers_dense
from neuronal_ray.models.wiring import trace_layout

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("seed", range(1, 9))
def test_a_fused_layout_is_recognized_whatever_the_weights(make_model: MakeModel, name: str, seed: int) -> None:
    """One lucky column must not pass for a layout in which a row reaches a single column."""
    layout = trace_layout(Stream(make_model(name, seed=seed)))
    for spec in layout.blocks[0]:
        if spec.linear.path in TRUTHS[name].sources:
            assert measured_sources(spec) == as_sets(TRUTHS[name].sources[spec.linear.path]), spec.linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "phi", *FUSED])
def test_half_precision_gives_the_same_layout(make_model: MakeModel, name: str, dtype: torch.dtype) -> None:
    full, half = (trace_layout(Stream(make_model(name).to(kind))) for kind in (torch.float32, dtype))
    for one, other in zip(full, half, strict=True):
        assert (one.linear, one.reads, one.consumer) == (other.linear, other.reads, other.consumer)
        assert measured_sources(one) == measured_sources(other), one.linear


def test_one_key_head_per_query_head_needs_no_sources(make_model: MakeModel) -> None:
    layout = trace_layout(Stream(make_model("llama", num_key_value_heads=4)))
    assert all(spec.sources is None for spec in layout)


def test_tracing_leaves_the_model_as_it_was(family: str, make_model: MakeModel) -> None:
    model = make_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace_layout(Stream(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name


def test_rows_that_match_no_columns_keep_the_blocks_rate_with_a_warning(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """A projection that writes 40 features where the stream has 32."""
    model = make_model("gpt2")

    class Wider(nn.Module):
        """Writes 40 features, of which the first 32 go on."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(32, 40)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.inner(hidden)[..., :32]
            return output

    for block in model.transformer.h:
        block.attn.c_proj = Wider()
    with caplog.at_level(logging.WARNING):
        layout = trace_layout(Stream(model.eval()))
    spec = layout[Linear(0, "attn.c_proj.inner")]
    assert (spec.consumer, spec.sources) == (None, None)
    assert "attn.c_proj.inner" in caplog.text


def test_a_linear_that_text_does_not_pass_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    for block in model.model.layers:
        block.spare = nn.Linear(4, 4)
    with pytest.raises(UnsupportedModel, match="no text passes through: spare"):
        trace_layout(Stream(model))


def test_a_linear_that_runs_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    for block in model.model.layers:
        block.mlp.up_proj = block.mlp.gate_proj
    with pytest.raises(UnsupportedModel, match="runs more than once in a block"):
        trace_layout(Stream(model))


def test_a_model_without_attention_heads_is_traced() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    stream = Stream(AutoModelForCausalLM.from_config(config).eval())
    keep_routers_dense(stream.model)  # dt_proj is not called: the model multiplies by its weight itself
    layout = trace_layout(stream)
    assert [spec.linear.path for spec in layout.blocks[0]] == [f"mixer.{name}_proj" for name in ("in", "x", "out")]


def test_an_encoder_is_refused() -> None:
    config = AutoConfig.for_model(
        "bert",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match="BertLMHeadModel is no decoder: its tokens see later ones"):
        trace_layout(Stream(model))
