"""A model to observe: of the real shapes, almost without memory, and computing as any other."""

import torch
from transformers import LlamaConfig, MixtralConfig

from neuronal_ray.models.blocks import Stream
from neuronal_ray.models.probe_model import probe_model


def test_a_model_of_seven_billion_weights_takes_little_memory_and_its_block_runs() -> None:
    model = probe_model(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    assert sum(parameter.numel() for parameter in model.parameters()) > 6.7e9
    assert sum(tensor.untyped_storage().nbytes() for tensor in model.state_dict().values()) < 20 * 2**20
    stream = Stream(model)
    hidden = stream.block(31, stream.start(torch.arange(6)[None])).hidden
    assert hidden.isfinite().all()
    assert hidden.std() > 0.01


def test_equal_configurations_give_equal_models() -> None:
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tokens = torch.arange(20).reshape(2, 10)
    logits = [Stream(probe_model(config)).model(input_ids=tokens).logits for _ in range(2)]
    assert torch.equal(*logits)
    assert logits[0].isfinite().all()
