"""Linears that select or weigh experts are found by what they do, with weights or without, and stay dense."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from neuronal_ray.models.blocks import find_blocks, find_linears
from neuronal_ray.models.checkpoint import empty_model, open_checkpoint
from neuronal_ray.models.experts import split_experts
from neuronal_ray.models.routers import keep_routers_dense
from neuronal_ray.workers.replica import Replica

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
ROUTERS: dict[str, tuple[dict[str, Any], list[set[str]]]] = {
    "llama": ({}, [set(), set()]),
    "hunyuan_v1_moe": (EXPERTS | {"moe_topk": 2}, [{"mlp.gate.wg"}] * 2),
    "afmoe": (EXPERTS | {"num_dense_layers": 1, "num_shared_experts": 1}, [set(), {"mlp.router.gate"}]),
    "jetmoe": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
        [{"mlp.router.layer", "self_attention.experts.router.layer"}] * 2,
    ),
    "phimoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, [{"mlp.router"}] * 2),
    "qwen2_moe": (EXPERTS | {"shared_expert_intermediate_size": 48}, [{"mlp.shared_expert_gate"}] * 2),
}


def config_of(kind: str) -> Any:
    return AutoConfig.for_model(kind, **SIZES | ROUTERS[kind][0])


def linears(model: torch.nn.Module) -> list[set[str]]:
    return [set(find_linears(block)) for block in find_blocks(model)[1]]


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_are_found_and_nothing_else(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind))
    split_experts(model, find_blocks(model)[1])
    before = linears(model)
    with caplog.at_level(logging.WARNING):
        keep_routers_dense(model)
    assert [old - new for old, new in zip(before, linears(model), strict=True)] == ROUTERS[kind][1]


@pytest.mark.parametrize("kind", ["phimoe", "qwen2_moe"])
def test_a_model_without_weights_and_every_shard_have_the_same_linears(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(kind)).save_pretrained(tmp_path)
    expected = linears(empty_model(open_checkpoint(tmp_path)))
    for shard in range(2):
        replica = Replica.load(tmp_path, device="cpu", dtype="float32", trust_remote_code=False, shard=shard, shards=2)
        assert {index: set(found) for index, found in replica.linears.items()} == {shard: expected[shard]}
    assert not [path for of_block in expected for path in of_block if "router" in path or path.endswith("expert_gate")]
