"""The true wiring of one block of each family of models, written down by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from neuronal_ray.core.layout import LinearSpec

Sources = list[list[int]]

NEXT = "next block"
HEADS = 4


def grouped_keys(head_dim: int) -> Sources:
    """List the sources of 2 key (or value) heads, each read by the 2 query heads of its group."""
    return [
        [query_head * head_dim + dim for query_head in (2 * key_head, 2 * key_head + 1)]
        for key_head in range(2)
        for dim in range(head_dim)
    ]


def queries_keys_values(columns: int) -> Sources:
    """List the sources of all queries, then all keys, then all values."""
    return [[row % columns] for row in range(3 * columns)]


def head_by_head(head_dim: int) -> Sources:
    """List the sources of the query, key and value of head 0, then those of head 1, and so on."""
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
FALCON = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
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
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", sources=queries_keys_values(32), values=range(64, 96)
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


def as_sets(sources: Sources) -> list[set[int]]:
    """Convert sources to sets; a source may be listed several times, if all of its row are listed equally often."""
    for row in sources:
        assert len({row.count(column) for column in row}) == 1, row
    return [set(row) for row in sources]


def measured_sources(spec: LinearSpec) -> list[set[int]]:
    return as_sets([[row] for row in range(spec.rows)] if spec.sources is None else spec.sources.tolist())
