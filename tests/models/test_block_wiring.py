"""The wiring of a block, measured against the true one of each family, and confirmed by gradients."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from wirings import HEADS, NEXT, TRUTHS, as_sets, measured_sources

from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.models.blocks import Stream, find_linears, weight_of
from neuronal_ray.models.routers import keep_routers_dense
from neuronal_ray.models.wiring import trace_layout

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
TEXT = torch.arange(3, 63).reshape(5, 12)  # [sequences, tokens]


@dataclass(frozen=True)
class Traced:
    """A model and its measured layout."""

    stream: Stream
    layout: Layout


@pytest.fixture(scope="module")
def traced(family: str, make_model: MakeModel) -> Traced:
    stream = Stream(make_model(family))
    return Traced(stream, trace_layout(stream))


# -- the tables


def test_linears_come_in_order_of_execution_with_their_shapes(family: str, traced: Traced) -> None:
    wanted = [Linear(block, path) for block in range(3) for path in TRUTHS[family].order]
    assert [spec.linear for spec in traced.layout] == wanted
    for spec in traced.layout:
        module = traced.stream.blocks[spec.linear.block].get_submodule(spec.linear.path)
        assert weight_of(module).shape == (spec.rows, spec.columns), spec.linear


def test_linears_that_read_one_tensor_are_one_group(family: str, traced: Traced) -> None:
    measured: dict[Group, list[str]] = {
        group: [spec.linear.path for spec in specs] for group, specs in traced.layout.groups.items()
    }
    assert measured == {
        Group(block, index): paths for block in range(3) for index, paths in enumerate(TRUTHS[family].groups)
    }


def test_each_linear_knows_its_consumer(family: str, traced: Traced) -> None:
    truth = TRUTHS[family]
    group_of = {path: index for index, paths in enumerate(truth.groups) for path in paths}
    for spec in traced.layout:
        block, path = spec.linear.block, spec.linear.path
        reader = truth.readers[path]
        following = None if block == 2 else Group(block + 1, 0)
        wanted = following if reader == NEXT else Group(block, group_of[reader])
        assert spec.consumer == wanted, (spec.linear, spec.consumer, wanted)


def test_rows_stand_for_the_columns_of_the_table(family: str, traced: Traced) -> None:
    truth = TRUTHS[family]
    for spec in traced.layout:
        if spec.linear.path not in truth.sources:
            assert spec.sources is None, spec.linear
            continue
        assert measured_sources(spec) == as_sets(truth.sources[spec.linear.path]), spec.linear


def test_the_tables_are_consistent(family: str) -> None:
    truth = TRUTHS[family]
    assert sorted(truth.order) == sorted(path for paths in truth.groups for path in paths) == sorted(truth.readers)
    assert set(truth.sources) <= set(truth.order)


# -- gradients


def influence(traced: Traced, spec: LinearSpec) -> torch.Tensor:
    """Return, [rows, columns], whether the row at any token changes the column of its consumer in this block."""
    assert spec.consumer is not None
    return influence_on(traced, spec, traced.layout.groups[spec.consumer][0].linear.path)


def influence_on(traced: Traced, spec: LinearSpec, reader: str) -> torch.Tensor:
    """Return, [rows, columns], whether the row at any token changes the column of the input of `reader`."""
    block = traced.stream.blocks[spec.linear.block]
    seen: dict[str, torch.Tensor] = {}

    def from_here(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        seen["rows"] = (output + 2 * output.std() * noise).requires_grad_()  # opens every ReLU somewhere
        return seen["rows"]

    def to_there(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen["columns"] = args[0]

    handles = [
        block.get_submodule(spec.linear.path).register_forward_hook(from_here),
        block.get_submodule(reader).register_forward_pre_hook(to_there),
    ]
    recording = traced.stream.start(TEXT)
    for index in range(spec.linear.block):
        recording = traced.stream.block(index, recording)
    args, kwargs = recording.calls[spec.linear.block]
    with torch.enable_grad():
        block(recording.hidden, *args, **kwargs)
    for handle in handles:
        handle.remove()
    rows, columns = seen["rows"], seen["columns"]
    acts = []
    for column in range(columns.shape[-1]):
        (gradient,) = torch.autograd.grad(columns[..., column].square().sum(), rows, retain_graph=True)
        acts.append(gradient.flatten(0, -2).abs().amax(dim=0) > 0)  # [sequences, tokens, rows] -> [rows]
    return torch.stack(acts, dim=1)


def test_gradients_confirm_the_sources(family: str, traced: Traced) -> None:
    """A value or a feed-forward row acts on its sources alone, a query or key on all of their heads."""
    truth = TRUTHS[family]
    attention = truth.readers[truth.order[0]]  # the projection that reads what the heads attended to
    for spec in traced.layout.blocks[1]:
        path = spec.linear.path
        if truth.readers[path] == NEXT:
            continue
        acting = influence(traced, spec)
        if path == attention:  # a norm lies between: every row acts on every column
            assert acting.all(), spec.linear
            continue
        alone = truth.values.get(path, ()) if truth.readers[path] == attention else range(spec.rows)
        head_dim = acting.shape[1] // HEADS
        for row, sources in enumerate(measured_sources(spec)):
            columns = set(acting[row].nonzero()[:, 0].tolist())
            heads = {source // head_dim for source in sources} if truth.whole_heads else range(HEADS)
            of_heads = {head * head_dim + dim for head in heads for dim in range(head_dim)}
            wanted = sources if row in alone else of_heads
            assert columns == wanted, (spec.linear, row, columns, wanted)


# -- sub-blocks


def attention_module(path: str) -> bool:
    """Return whether the name of a module that contains the linear means attention."""
    return any(part in ("attn", "self_attn", "attention", "self_attention") for part in path.split("."))


def test_the_linears_around_the_mixing_of_tokens_are_attention(family: str, traced: Traced) -> None:
    wanted = {spec.linear: "attention" if attention_module(spec.linear.path) else "mlp" for spec in traced.layout}
    assert {spec.linear: spec.sub_block for spec in traced.layout} == wanted
    assert set(wanted.values()) == {"attention", "mlp"}


def test_the_sub_block_is_measured_whatever_attention_is_called(make_model: MakeModel) -> None:
    """In a block without a mixing of tokens nothing is attention."""
    model = make_model("llama")

    class Pointwise(nn.Module):
        """Has projections as attention, but mixes no tokens."""

        def __init__(self) -> None:
            super().__init__()
            self.v_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, hidden_states: torch.Tensor, **_: object) -> tuple[torch.Tensor, None]:
            return self.o_proj(self.v_proj(hidden_states)), None

    for block in model.model.layers:
        block.self_attn = Pointwise()
    layout = trace_layout(Stream(model.eval()))
    assert {spec.sub_block for spec in layout} == {"mlp"}


def test_a_feed_forward_before_attention_is_no_attention(make_model: MakeModel) -> None:
    """Keys and values read its output and also the block's input, unlike that of a factor of a low-rank projection."""
    model = make_model("llama")

    class Before(nn.Module):
        """Feed-forward, then attention."""

        def __init__(self, attention: nn.Module) -> None:
            super().__init__()
            self.first = nn.Linear(32, 32)
            self.attention = attention

        def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> object:
            return self.attention(hidden_states=hidden_states + self.first(hidden_states).relu(), **kwargs)

    for block in model.model.layers:
        block.self_attn = Before(block.self_attn)
    parts = {spec.linear.path: spec.sub_block for spec in trace_layout(Stream(model.eval())).blocks[0]}
    assert parts["self_attn.first"] == "mlp"
    assert all(part == "attention" for path, part in parts.items() if "self_attn.attention" in path), parts


# -- experts

ALTERNATING = {"gpt_oss"}  # gate 0, up 0, gate 1, up 1, ...
SHARED_FIRST = {"qwen2_moe"}  # runs an expert for all tokens before the others
NO_SOURCES = ("q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "shared_expert_gate")
"""Latent attention and the weight of a shared expert: no row stands for one column."""


@pytest.fixture(scope="module")
def traced_experts(moe_family: str, make_model: MakeModel) -> Traced:
    stream = Stream(make_model(moe_family))
    keep_routers_dense(stream.model)
    return Traced(stream, trace_layout(stream))


def of_experts(layout: Layout, block: int) -> list[LinearSpec]:
    return [spec for spec in layout.blocks[block] if spec.expert is not None]


def test_each_expert_reads_what_is_routed_to_it(traced_experts: Traced) -> None:
    layout = traced_experts.layout
    for block in (1, 2):
        experts = of_experts(layout, block)
        assert [(spec.expert, spec.linear.path.rsplit(".")[-1]) for spec in experts] == [
            (index, stack) for index in range(4) for stack in ("gate_up_proj", "down_proj")
        ]
        reads = [spec.reads for spec in experts]
        first = reads[0].index
        assert reads == [Group(block, first + offset) for offset in range(8)]
        assert all(layout.groups[spec.reads] == [spec] for spec in experts)
        assert {spec.sub_block for spec in experts} == {"mlp"}


def test_each_expert_writes_for_itself_then_for_the_next_block(moe_family: str, traced_experts: Traced) -> None:
    for block in (1, 2):
        experts = of_experts(traced_experts.layout, block)
        for gate_up, down in zip(experts[::2], experts[1::2], strict=True):
            width = down.columns
            assert gate_up.rows == 2 * width
            assert gate_up.consumer == down.reads
            halves = [[row // 2 if moe_family in ALTERNATING else row % width] for row in range(2 * width)]
            assert measured_sources(gate_up) == as_sets(halves), gate_up.linear
            assert down.consumer == (Group(2, 0) if block == 1 else None)
            assert down.sources is None


def test_attention_writes_for_what_runs_first_after_it(moe_family: str, traced_experts: Traced) -> None:
    (output,) = (spec for spec in traced_experts.layout.blocks[1] if spec.linear.path.endswith("o_proj"))
    assert output.consumer is not None
    assert output.consumer.index == output.reads.index + 1
    reader = traced_experts.layout.groups[output.consumer][0]
    assert reader.expert == (None if moe_family in SHARED_FIRST else 0), reader


def test_gradients_confirm_the_experts_wiring(moe_family: str, traced_experts: Traced) -> None:
    experts = of_experts(traced_experts.layout, 1)
    for gate_up, down in zip(experts[::2], experts[1::2], strict=True):
        acting = influence(traced_experts, gate_up)
        wanted = torch.zeros_like(acting)
        for row, sources in enumerate(measured_sources(gate_up)):
            wanted[row, list(sources)] = True
        assert torch.equal(acting, wanted), gate_up.linear
        assert gate_up.expert == down.expert


def test_attention_next_to_experts_is_recognized(traced_experts: Traced) -> None:
    for spec in traced_experts.layout:
        assert spec.sub_block == ("attention" if attention_module(spec.linear.path) else "mlp"), spec.linear
        unmatched = spec.linear.path.endswith(NO_SOURCES)
        leaves = spec.linear.block == 2 and spec.sub_block == "mlp" and "down_proj" in spec.linear.path
        assert (spec.consumer is None) == (unmatched or leaves), spec.linear
        assert not (unmatched and spec.sources is not None), spec.linear


def test_the_tables_order_is_that_of_execution(traced_experts: Traced) -> None:
    """Where the text reaches all experts, they run in the layout's order."""
    ran: list[str] = []
    stream = traced_experts.stream
    handles = [
        module.register_forward_pre_hook(lambda _, __, path=path: ran.append(path))
        for path, module in find_linears(stream.blocks[1]).items()
    ]
    stream.block(1, stream.start(TEXT))
    for handle in handles:
        handle.remove()
    assert [path for path in ran if path != "mlp.router"] == [
        spec.linear.path for spec in traced_experts.layout.blocks[1]
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_that_no_token_reaches_are_wired_like_the_others(make_model: MakeModel, name: str, seed: int) -> None:
    model = make_model(name, seed=seed, num_local_experts=32, num_experts_per_tok=1)
    experts = of_experts(trace_layout(Stream(model)), 1)
    assert [spec.expert for spec in experts] == [index for index in range(32) for _ in range(2)]
    sources = measured_sources(experts[0])
    assert len(set(map(len, sources))) == 1
    for gate_up, down in zip(experts[::2], experts[1::2], strict=True):
        assert gate_up.consumer == down.reads
        assert down.reads.index == gate_up.reads.index + 1
        assert (
            measured_sources(gate_up)
            == sources
            == as_sets([[row // 2 if name in ALTERNATING else row % 56] for row in range(112)])
        )


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_experts_in_half_precision_have_the_same_layout(make_model: MakeModel, name: str) -> None:
    full, half = (trace_layout(Stream(make_model(name).to(kind))) for kind in (torch.float32, torch.bfloat16))
    for one, other in zip(full, half, strict=True):
        assert (one.linear, one.reads, one.consumer, one.sub_block) == (
            other.linear,
            other.reads,
            other.consumer,
            other.sub_block,
        )
        assert measured_sources(one) == measured_sources(other), one.linear


class ListedExperts(nn.Module):
    """Experts as modules of their own, each called with the tokens that an nn.Linear router gives it."""

    def __init__(self, num_experts: int, *, called_when_empty: bool) -> None:
        super().__init__()
        self.gate = nn.Linear(32, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(32, 48, bias=False), "down": Conv1D(32, 48)}) for _ in range(num_experts)
        )
        self.called_when_empty = called_when_empty

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, -2)
        choice = self.gate(flat).argmax(dim=-1)
        output = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            mine = choice == index
            if mine.any() or self.called_when_empty:
                output[mine] = expert["down"](expert["up"](flat[mine]).relu())
        return output.view_as(hidden)


@pytest.mark.parametrize("called_when_empty", [False, True])
def test_experts_that_are_modules_are_wired_too(make_model: MakeModel, called_when_empty: bool) -> None:
    model = make_model("llama")
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = ListedExperts(12, called_when_empty=called_when_empty)
    layout = trace_layout(Stream(model.eval()))
    experts = of_experts(layout, 0)
    assert [(spec.linear.path, spec.expert) for spec in experts] == [
        (f"mlp.experts.{index}.{name}", index) for index in range(12) for name in ("up", "down")
    ]
    for up, down in zip(experts[::2], experts[1::2], strict=True):
        assert (up.consumer, down.consumer) == (down.reads, Group(1, 0))
        assert up.sources is down.sources is None
    router = layout[Linear(0, "mlp.gate")]
    assert (router.expert, router.consumer, router.sources) == (None, None, None)


def test_lists_whose_members_see_all_tokens_are_no_experts(make_model: MakeModel) -> None:
    model = make_model("llama")

    class Listed(nn.Module):
        """Two linears in a list, one after the other."""

        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.steps[1](self.steps[0](hidden).relu())
            return output

    for block in model.model.layers:
        block.mlp = Listed()
    layout = trace_layout(Stream(model.eval()))
    assert all(spec.expert is None for spec in layout)
    assert layout[Linear(0, "mlp.steps.0")].consumer == layout[Linear(0, "mlp.steps.1")].reads


def test_experts_that_all_see_all_tokens_are_ordinary_linears(make_model: MakeModel) -> None:
    model = make_model("mixtral", num_experts_per_tok=4)
    layout = trace_layout(Stream(model))
    assert [spec.expert for spec in layout] == [None] * len(layout.specs)
    assert len(layout.blocks[0]) == 4 + 2 * 4
    for spec in layout.blocks[0]:
        if "gate_up" in spec.linear.path:
            assert measured_sources(spec) == as_sets([[row % 56] for row in range(112)]), spec.linear


def test_rows_of_latent_attention_keep_the_blocks_rate_with_a_warning(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys and values alternate head by head with other widths than the output's heads have."""
    with caplog.at_level(logging.WARNING):
        layout = trace_layout(Stream(make_model("deepseek_v3")))
    for name in ("q_b_proj", "kv_b_proj"):
        spec = layout[Linear(1, f"self_attn.{name}")]
        assert (spec.consumer, spec.sources) == (None, None)
        assert name in caplog.text
