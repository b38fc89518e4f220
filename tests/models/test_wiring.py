"""Is the measured wiring the true one, written down by hand for each family, and confirmed by gradients?"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from neuronal_ray.core.layout import Group, Layout, Linear, LinearSpec
from neuronal_ray.models.blocks import Stream, UnsupportedModel, weight_of
from neuronal_ray.models.wiring import trace_layout

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
Sources = list[list[int]]

NEXT = "next block"
HEADS = 4
TEXT = torch.arange(3, 63).reshape(5, 12)  # [sequences, tokens]


def grouped_keys(head_dim: int) -> Sources:
    """Rows of 2 key (or value) heads, each read by the 2 query heads of its group."""
    return [
        [query_head * head_dim + dim for query_head in (2 * key_head, 2 * key_head + 1)]
        for key_head in range(2)
        for dim in range(head_dim)
    ]


def queries_keys_values(columns: int) -> Sources:
    """All queries, then all keys, then all values."""
    return [[row % columns] for row in range(3 * columns)]


def head_by_head(head_dim: int) -> Sources:
    """The query, key and value of head 0, then those of head 1, and so on."""
    return [[head * head_dim + dim] for head in range(HEADS) for _ in "qkv" for dim in range(head_dim)]


PHI3_QKV = [[column, column] for column in range(32)] + 2 * grouped_keys(8)  # 4 query, 2 key, 2 value heads
PHI3_GATE_UP = [[row % 56] for row in range(112)]  # all gates, then all ups
MULTI_QUERY = [[column] * 4 for column in range(32)] + 2 * [
    [head * 8 + dim for head in range(HEADS)] for dim in range(8)
]  # 4 query heads, then one key and one value head for all of them
GROUP_BY_GROUP = [  # Falcon's new decoder: for each of 2 groups its 2 query heads, its key head, its value head
    sources
    for group in range(2)
    for sources in (
        [[(2 * group + query) * 8 + dim] * 2 for query in range(2) for dim in range(8)]
        + 2 * [[2 * group * 8 + dim, (2 * group + 1) * 8 + dim] for dim in range(8)]
    )
]


@dataclass(frozen=True, kw_only=True)
class Truth:
    """One block of a family.

    `order`: its linears as they run. `groups`: who shares an input, in order of first use. `readers`: for each linear
    the first linear that reads what it writes. `sources`: where rows are not columns. `values`: of the linears that
    write attention values, the rows that do. `whole_heads`: whether a query or key stays within its own head.
    """

    order: list[str]
    groups: list[list[str]]
    readers: dict[str, str]
    sources: dict[str, Sources] = field(default_factory=dict)
    values: dict[str, Sequence[int]] = field(default_factory=dict)
    whole_heads: bool = True


def llama(*, head_dim: int = 8, whole_heads: bool = True) -> Truth:
    """Separate projections, feed-forward after attention; also Mistral, Qwen, Gemma, OLMo 2, StableLM."""
    q, k, v, o = (f"self_attn.{name}_proj" for name in "qkvo")
    gate, up, down = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    return Truth(
        order=[q, k, v, o, gate, up, down],
        groups=[[q, k, v], [o], [gate, up], [down]],
        readers={q: o, k: o, v: o, o: gate, gate: down, up: down, down: NEXT},
        sources={k: grouped_keys(head_dim), v: grouped_keys(head_dim)},
        values={v: range(2 * head_dim)},
        whole_heads=whole_heads,
    )


def fused(qkv: str, dense: str, up: str, down: str, *, sources: Sources, values: Sequence[int]) -> Truth:
    """One projection for query, key and value; feed-forward after attention."""
    return Truth(
        order=[qkv, dense, up, down],
        groups=[[qkv], [dense], [up], [down]],
        readers={qkv: dense, dense: up, up: down, down: NEXT},
        sources={qkv: sources},
        values={qkv: values},
    )


QKV = [f"self_attn.{name}_proj" for name in "qkv"]
FALCON = (
    "self_attention.query_key_value",
    "self_attention.dense",
    "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h",
)
NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
HEAD_BY_HEAD_VALUES = [head * 24 + 16 + dim for head in range(HEADS) for dim in range(8)]

TRUTHS = {
    "llama": llama(),
    "mistral": llama(),
    "opt": Truth(
        order=[*QKV, "self_attn.out_proj", "fc1", "fc2"],
        groups=[QKV, ["self_attn.out_proj"], ["fc1"], ["fc2"]],
        readers=dict.fromkeys(QKV, "self_attn.out_proj") | {"self_attn.out_proj": "fc1", "fc1": "fc2", "fc2": NEXT},
        values={"self_attn.v_proj": range(32)},
    ),
    "phi": Truth(  # attention and feed-forward in parallel: one norm, one input, both added to the stream
        order=[*QKV, "self_attn.dense", "mlp.fc1", "mlp.fc2"],
        groups=[[*QKV, "mlp.fc1"], ["self_attn.dense"], ["mlp.fc2"]],
        readers=dict.fromkeys(QKV, "self_attn.dense")
        | {"self_attn.dense": NEXT, "mlp.fc1": "mlp.fc2", "mlp.fc2": NEXT},
        values={"self_attn.v_proj": range(32)},
    ),
    "phi3": Truth(
        order=["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"],
        groups=[["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
        readers={
            "self_attn.qkv_proj": "self_attn.o_proj",
            "self_attn.o_proj": "mlp.gate_up_proj",
            "mlp.gate_up_proj": "mlp.down_proj",
            "mlp.down_proj": NEXT,
        },
        sources={"self_attn.qkv_proj": PHI3_QKV, "mlp.gate_up_proj": PHI3_GATE_UP},
        values={"self_attn.qkv_proj": range(48, 64)},
    ),
    "qwen2": llama(),
    "qwen3": llama(head_dim=16),
    "gemma2": llama(head_dim=16),
    "gemma3_text": llama(head_dim=16),
    "gpt_neox": Truth(  # parallel, but each branch has a norm of its own
        order=list(NEOX),
        groups=[[path] for path in NEOX],
        readers={NEOX[0]: NEOX[1], NEOX[1]: NEXT, NEOX[2]: NEOX[3], NEOX[3]: NEXT},
        sources={NEOX[0]: head_by_head(8)},
        values={NEOX[0]: HEAD_BY_HEAD_VALUES},
    ),
    "gpt2": fused(
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
        sources=queries_keys_values(32),
        values=range(64, 96),
    ),
    "falcon": Truth(  # parallel with one norm; multi-query
        order=list(FALCON),
        groups=[[FALCON[0], FALCON[2]], [FALCON[1]], [FALCON[3]]],
        readers={FALCON[0]: FALCON[1], FALCON[1]: NEXT, FALCON[2]: FALCON[3], FALCON[3]: NEXT},
        sources={FALCON[0]: MULTI_QUERY},
        values={FALCON[0]: range(40, 48)},
    ),
    "falcon_new_decoder": Truth(  # parallel with two norms
        order=list(FALCON),
        groups=[[path] for path in FALCON],
        readers={FALCON[0]: FALCON[1], FALCON[1]: NEXT, FALCON[2]: FALCON[3], FALCON[3]: NEXT},
        sources={FALCON[0]: GROUP_BY_GROUP},
        values={FALCON[0]: [*range(24, 32), *range(56, 64)]},
    ),
    "falcon_alibi": fused(*FALCON, sources=head_by_head(8), values=HEAD_BY_HEAD_VALUES),
    "olmo2": llama(whole_heads=False),  # its norms of queries and keys run over all heads
    "stablelm": llama(),
}
FUSED = ["phi3", "gpt2", "gpt_neox", "falcon", "falcon_new_decoder", "falcon_alibi"]


@dataclass(frozen=True)
class Traced:
    """A model and what was measured of it."""

    stream: Stream
    layout: Layout


@pytest.fixture(scope="module")
def traced(family: str, make_model: MakeModel) -> Traced:
    stream = Stream(make_model(family))
    return Traced(stream, trace_layout(stream))


def as_sets(sources: Sources) -> list[set[int]]:
    """A source may be listed several times, as long as all of a row's are listed equally often."""
    for row in sources:
        assert len({row.count(column) for column in row}) == 1, row
    return [set(row) for row in sources]


def measured_sources(spec: LinearSpec) -> list[set[int]]:
    return as_sets([[row] for row in range(spec.rows)] if spec.sources is None else spec.sources.tolist())


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


def test_the_tables_name_whom_they_say(family: str) -> None:
    truth = TRUTHS[family]
    assert sorted(truth.order) == sorted(path for paths in truth.groups for path in paths) == sorted(truth.readers)
    assert set(truth.sources) <= set(truth.order)


# -- gradients


def influence(traced: Traced, spec: LinearSpec) -> torch.Tensor:
    """[rows, columns]: does the row, at any token, act on the column of its consumer in this block?"""
    assert spec.consumer is not None
    block = traced.stream.blocks[spec.linear.block]
    reader = traced.layout.groups[spec.consumer][0].linear.path
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


# -- robustness


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


def test_rows_that_match_no_columns_keep_the_blocks_rate_and_say_so(
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
    with pytest.raises(UnsupportedModel, match="text does not pass through: spare"):
        trace_layout(Stream(model))


def test_a_linear_that_runs_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model("llama")
    for block in model.model.layers:
        block.mlp.up_proj = block.mlp.gate_proj
    with pytest.raises(UnsupportedModel, match="runs more than once in a block"):
        trace_layout(Stream(model))


def test_a_model_without_attention_heads_is_refused_for_its_blocks() -> None:
    config = AutoConfig.for_model("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=64, state_size=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match="as one parameter"):
        trace_layout(Stream(model))


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
