"""Which tiny random models do the tests run on, and how do hypothesis and the hub behave during the tests?"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when transformers is imported: no test may reach the hub

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.register_profile("wide", deadline=None, max_examples=2000)  # pytest --hypothesis-profile=wide
settings.load_profile("tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, aloud, where there is none.

    Of the processes that share the tests one has a module's, and one has all that start a Ray.
    """
    if config.pluginmanager.hasplugin("xdist"):
        torch.set_num_threads(1)  # there are several of us
        for item in items:
            group = "ray" if item.get_closest_marker("ray") is not None else str(item.path)
            item.add_marker(pytest.mark.xdist_group(group))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


MakeModel = Callable[..., PreTrainedModel]

VOCABULARY = 64
BLOCKS = 3

_TOKENS: dict[str, object] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = _TOKENS | {
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_WIDE_HEADS = _GROUPED | {"head_dim": 16}  # 4 heads of 16 make 64 features, twice the hidden size
_FALCON = _TOKENS | {"hidden_size": 32, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}

FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", _GROUPED | {"sliding_window": 4}),
    "opt": (
        "opt",
        _TOKENS
        | {
            "hidden_size": 32,
            "ffn_dim": 56,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "phi": ("phi", _SIZES),
    "phi3": ("phi3", _GROUPED),
    "qwen2": ("qwen2", _GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", _WIDE_HEADS),
    "gemma2": ("gemma2", _WIDE_HEADS | {"sliding_window": 4}),
    "gemma3_text": ("gemma3_text", _WIDE_HEADS | {"sliding_window": 4}),
    "gpt_neox": ("gpt_neox", _SIZES),
    "gpt2": ("gpt2", _TOKENS | {"n_embd": 32, "n_inner": 56, "n_layer": BLOCKS, "n_head": 4, "n_positions": 64}),
    "falcon": ("falcon", _FALCON | {"multi_query": True}),
    "falcon_new_decoder": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": ("falcon", _FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False}),
    "olmo2": ("olmo2", _GROUPED),
    "stablelm": ("stablelm", _GROUPED),
}

_EXPERTS = _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
_LATENT = {  # DeepSeek's low-rank queries, keys and values
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}

MOE_FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "mixtral": ("mixtral", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS),
    "qwen2_moe": ("qwen2_moe", _EXPERTS | {"shared_expert_intermediate_size": 40}),
    "olmoe": ("olmoe", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (  # one dense block, then experts
        "deepseek_v3",
        _GROUPED
        | _LATENT
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (  # experts transposed, with biases, gate and up alternating
        "gpt_oss",
        _GROUPED
        | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "granitemoe": ("granitemoe", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
}
"""Mixtures of experts; `tiny_model` makes them too."""


def tiny_model(name: str, *, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of the family, `changes` in its configuration; no weight, bias or scale is trivial (0 or 1)."""
    model_type, config = (FAMILIES | MOE_FAMILIES)[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(config | changes)))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each family in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session", params=list(MOE_FAMILIES))
def moe_family(request: pytest.FixtureRequest) -> str:
    """Each mixture of experts in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """`make_model(name, seed=..., **changes in the configuration)`, a new model at each call."""
    return tiny_model


@pytest.fixture(scope="session")
def checkpoint_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint_dir(name)`: the directory of the family's model as saved; to be read only."""

    @functools.cache
    def save(name: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "model"
        tiny_model(name).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="module", autouse=True)
def _threads() -> Iterator[None]:
    """A worker that sets the number of this process's threads does not leave it set."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_thread(_threads: None) -> None:
    """Tiny models lose time with more."""
    torch.set_num_threads(1)
