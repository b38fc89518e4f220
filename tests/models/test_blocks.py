"""A model run block by block equals the model's own forward, bit for bit, for every family."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AlbertConfig, AlbertForMaskedLM, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from neuronal_ray.models.blocks import (
    Recording,
    Stream,
    UnsupportedModel,
    find_blocks,
    find_linears,
    is_transposed,
    set_weight,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]

VOCABULARY, LENGTH = 64, 12  # longer than the sliding windows of 4
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def text(sequences: int, *, seed: int = 0) -> torch.Tensor:
    """[sequences, LENGTH] tokens."""
    return torch.randint(3, VOCABULARY, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def small(model_type: str, **config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(SMALL | config))).eval()


@pytest.fixture(scope="module")
def stream(family: str, make_model: MakeModel) -> Stream:
    return Stream(make_model(family))


def replayed(stream: Stream, tokens: torch.Tensor) -> torch.Tensor:
    recording = stream.start(tokens)
    for index in range(len(stream.blocks)):
        recording = stream.block(index, recording)
    return stream.finish(tokens, recording)


def logits_of(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


def patched(stream: Stream) -> list[int]:
    """Return the blocks whose forward is not their class's."""
    return [index for index, block in enumerate(stream.blocks) if "forward" in vars(block)]


# -- replay


@pytest.mark.parametrize("sequences", [1, 3])
def test_the_replay_equals_the_models_own_logits(stream: Stream, sequences: int) -> None:
    tokens = text(sequences)
    assert torch.equal(replayed(stream, tokens), logits_of(stream.model, tokens))


def test_texts_of_one_shape_do_not_disturb_one_another(stream: Stream) -> None:
    one, other = text(2, seed=1), text(2, seed=2)
    recordings = [stream.start(one), stream.start(other)]
    for index in range(len(stream.blocks)):
        recordings = [stream.block(index, recording) for recording in recordings]
    assert torch.equal(stream.finish(one, recordings[0]), logits_of(stream.model, one))
    assert torch.equal(stream.finish(other, recordings[1]), logits_of(stream.model, other))


def test_texts_of_one_shape_share_the_arguments_of_the_blocks(stream: Stream) -> None:
    recording = stream.start(text(2, seed=1))
    assert stream.start(text(2, seed=2)).calls is recording.calls
    assert stream.start(text(1)).calls is not recording.calls


def test_texts_keep_arguments_that_depend_on_the_text(make_model: MakeModel) -> None:
    model = make_model("llama")

    def add(_: nn.Module, args: tuple[torch.Tensor], kwargs: dict[str, object]) -> tuple[object, object]:
        return args, kwargs | {"of_the_text": args[0].sum()}

    for block in model.model.layers:
        block.register_forward_pre_hook(add, with_kwargs=True)
    stream = Stream(model)
    recordings = [stream.start(text(2, seed=seed)) for seed in (1, 2, 1)]
    for recording in recordings:
        assert all(torch.equal(kwargs["of_the_text"], recording.hidden.sum()) for _, kwargs in recording.calls)


def test_another_last_block_gives_other_logits(stream: Stream) -> None:
    tokens = text(1)
    recording = stream.start(tokens)
    noise = torch.randn(recording.hidden.shape, generator=torch.Generator().manual_seed(0))
    logits = stream.finish(tokens, Recording(noise, recording.calls))
    assert not torch.equal(logits, stream.finish(tokens, recording)), "finish ignored the hidden states it was given"


def test_the_sliding_window_takes_effect(make_model: MakeModel) -> None:
    """Otherwise the replay would not test it."""
    windowed, wide = make_model("mistral"), make_model("mistral", sliding_window=None)
    assert not torch.equal(logits_of(windowed, text(1)), logits_of(wide, text(1)))


# -- forwards are put back


def test_blocks_keep_their_own_forward(stream: Stream) -> None:
    tokens = text(1)
    assert not patched(stream), "after the constructor"
    recording = stream.start(tokens)
    assert not patched(stream), "after start"
    stream.finish(tokens, recording)
    assert not patched(stream), "after finish"


def test_blocks_get_their_forward_back_after_an_error(stream: Stream) -> None:
    tokens = text(1)
    recording = stream.start(tokens)
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        stream.start(tokens + VOCABULARY)  # not in the vocabulary
    assert not patched(stream), "after an error in start"
    with pytest.raises((IndexError, ValueError, RuntimeError)):
        stream.finish(tokens, Recording(recording.hidden[..., :-1], recording.calls))
    assert not patched(stream), "after an error in finish"
    assert torch.equal(replayed(stream, tokens), logits_of(stream.model, tokens))


# -- what is refused


def one_line(error: pytest.ExceptionInfo[UnsupportedModel]) -> str:
    message = str(error.value)
    assert message.startswith("--model: ")
    assert len(message.splitlines()) == 1, message
    return message


def test_the_blocks_are_the_list_as_long_as_the_configuration_says(stream: Stream) -> None:
    name, blocks = find_blocks(stream.model)
    assert len(blocks) == 3
    assert stream.model.get_submodule(name) is blocks is stream.blocks
    assert name == stream.blocks_name


def test_a_model_without_a_list_of_blocks_is_refused() -> None:
    """ALBERT runs one block several times."""
    config = AlbertConfig(
        vocab_size=VOCABULARY, hidden_size=16, embedding_size=16, num_hidden_layers=3, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModel, match=r"expected one list of 3 .*, found 0: none") as error:
        find_blocks(AlbertForMaskedLM(config))
    one_line(error)


def test_a_model_with_several_lists_of_that_length_is_refused() -> None:
    """XLM keeps attention, feed-forward and norms of its blocks in lists of their own."""
    config = AutoConfig.for_model("xlm", emb_dim=16, n_layers=2, n_heads=2, n_words=VOCABULARY)
    with pytest.raises(UnsupportedModel, match=r"found 4: transformer\.attentions, ") as error:
        find_blocks(AutoModelForCausalLM.from_config(config))
    one_line(error)


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("mixtral", {"num_local_experts": 2}),
        ("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8}),
    ],
)
def test_experts_that_were_not_split_are_refused(model_type: str, config: dict[str, object]) -> None:
    model = small(model_type, **config)
    _, blocks = find_blocks(model)
    with pytest.raises(UnsupportedModel, match=r"experts.*weights as one parameter") as error:
        find_linears(blocks[0])
    one_line(error)
    Stream(model)
    assert any(path.endswith("experts.1.down_proj") for path in find_linears(blocks[0]))


def test_a_model_that_works_between_its_blocks_is_refused() -> None:
    model = small("llama")
    stream = Stream(model)
    handle = model.model.layers[0].register_forward_hook(lambda _, __, output: output * 2)
    with pytest.raises(UnsupportedModel, match="does more between its blocks") as error:
        stream.start(text(1))
    handle.remove()
    one_line(error)
    assert not patched(stream)


def test_a_block_without_linears_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"no nn\.Linear in a block of type LayerNorm"):
        find_linears(nn.LayerNorm(4))


def test_two_linears_with_one_weight_are_refused() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    block[1].weight = block[0].weight
    with pytest.raises(UnsupportedModel, match="tied"):
        find_linears(block)


# -- linears


def test_all_linears_of_a_block_are_found(stream: Stream) -> None:
    for block in stream.blocks:
        found = find_linears(block)
        wanted = [path for path, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        assert list(found) == wanted
        assert all(block.get_submodule(path) is module for path, module in found.items())


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_weights_are_read_and_set_as_rows_of_outputs(kind: type[nn.Module]) -> None:
    module = nn.Linear(5, 3) if kind is nn.Linear else Conv1D(3, 5)
    assert is_transposed(module) is (kind is Conv1D)
    own, stored_shape = weight_of(module), module.weight.shape
    assert own.shape == (3, 5)
    inputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(inputs), functional.linear(inputs, own, module.bias))
    weight = torch.arange(15.0).reshape(3, 5)
    set_weight(module, weight)
    assert torch.equal(weight_of(module), weight)
    assert module.weight.shape == stored_shape
    torch.testing.assert_close(module(inputs), functional.linear(inputs, weight, module.bias))
    set_weight(module, own)
    assert weight_of(module).data_ptr() == own.data_ptr()
    assert weight_of(module).stride() == own.stride()
