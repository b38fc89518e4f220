"""Opening and loading checkpoints, and refusing unusable ones in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models.blocks import Stream, find_blocks, find_linears, weight_of
from neuronal_ray.models.checkpoint import Checkpoint, empty_model, load_model, open_checkpoint
from neuronal_ray.models.experts import Expert
from neuronal_ray.models.hub import resolve_model
from neuronal_ray.models.routers import keep_routers_dense

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
TOKENS = torch.arange(3, 27).reshape(2, 12)


def refusal(path: Path, kind: type[BadInput] = BadInput) -> str:
    """Return the one line with which the checkpoint is refused."""
    with pytest.raises(BadInput, match=r"^--model: ") as error:
        open_checkpoint(path)
    assert type(error.value) is kind
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


def change_config(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))


def write_header(path: Path, header: bytes) -> None:
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def load(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_model(checkpoint, device=CPU, dtype=dtype)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return logits


# -- where the model lies


def test_a_directory_is_the_model_and_builtin_is_a_name(folder: Path, tmp_path: Path) -> None:
    assert resolve_model(str(folder)) == folder.resolve()
    assert resolve_model("builtin").parts[-2:] == ("builtin", "model")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c"])
def test_a_path_to_nothing_is_refused_without_asking_the_hub(name: str) -> None:
    with pytest.raises(BadInput, match=f"^--model: no directory {name}$"):
        resolve_model(name)


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no such model!"])
def test_an_id_that_the_hub_does_not_have_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(BadInput, match=r"^--model: .* is neither a directory nor on the hub") as error:
        resolve_model(name)
    assert len(str(error.value).splitlines()) == 1, error.value


# -- opening


def test_all_tensors_are_found(checkpoint_dir: Callable[[str], Path], family: str) -> None:
    path = checkpoint_dir(family)
    checkpoint = open_checkpoint(path)
    stored = load_file(path / "model.safetensors")
    assert {name: where.shape for name, where in checkpoint.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items()
    }
    assert {where.dtype for where in checkpoint.tensors.values()} == {"F32"}
    assert checkpoint.num_bytes == sum(4 * tensor.numel() for tensor in stored.values())
    assert checkpoint.files == [path / "model.safetensors"]


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{nope", "not a valid JSON file"),
        ("[1]", "model_type"),
        ('{"model_type": "no-such-type"}', "no-such-type"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}', "not a multiple"),
    ],
)
def test_an_invalid_configuration_is_refused(folder: Path, text: str, expected: str) -> None:
    (folder / "config.json").write_text(text)
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "gptq", "bits": 4, "group_size": 128}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
)
def test_a_quantized_checkpoint_is_refused(folder: Path, quantization: dict[str, object]) -> None:
    change_config(folder, quantization_config=quantization)
    assert "quantized" in refusal(folder, UnsupportedModel)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, vocab_size=32)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert "encoder-decoder" in refusal(tmp_path, UnsupportedModel)


def test_pickled_weights_alone_are_refused(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "only safetensors are read" in (line := refusal(folder))
    assert "has pytorch_model.bin; convert it: python -c" in line


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, kept: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    assert "truncated" in refusal(folder)


def test_a_file_with_more_than_its_header_lists_is_refused(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")
    assert "damaged" in refusal(folder)


@pytest.mark.parametrize(
    "header",
    [
        b"{nope",
        b"\xff\xfe{}",
        b"[]",
        b"12",
        b'{"a": 3}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": [0]}}',
        b'{"a": {"data_offsets": [0, 0], "shape": [0]}}',
    ],
)
def test_a_garbage_header_is_refused(folder: Path, header: bytes) -> None:
    write_header(folder, header)
    assert "unreadable header" in refusal(folder)


def test_a_header_longer_than_the_file_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"garbage, not a header")
    assert "truncated or not a safetensors file" in refusal(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_linears_that_are_not_stored_as_floats_are_refused(folder: Path, dtype: torch.dtype) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal(folder, UnsupportedModel)
    assert "model.layers.1.mlp.up_proj.weight" in message
    assert "F16, BF16, F32, F64" in message


# -- shards


def test_shards_are_one_checkpoint(sharded: Path, checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint, whole = open_checkpoint(sharded), open_checkpoint(checkpoint_dir("llama"))
    assert len(checkpoint.files) > 3, checkpoint.files
    assert {name: where.shape for name, where in checkpoint.tensors.items()} == {
        name: where.shape for name, where in whole.tensors.items()
    }
    assert torch.equal(logits_of(load(checkpoint)), logits_of(load(whole)))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    assert f"{lost.name} is missing" in refusal(sharded)


# -- names


def test_names_are_found_with_and_without_prefix(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "base")
    name = "transformer.h.0.attn.c_attn.weight"
    assert open_checkpoint(tmp_path / "whole").stored_name(name) == name
    base = open_checkpoint(tmp_path / "base")
    assert base.stored_name(name) == "h.0.attn.c_attn.weight"
    assert torch.equal(logits_of(load(base)), logits_of(model))
    assert open_checkpoint(tmp_path / "whole").stored_name("h.0.attn.c_attn.weight") == name


def test_a_name_that_is_stored_nowhere_or_twice_is_refused(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    with pytest.raises(UnsupportedModel, match=r"^--model: model\.layers\.9\.w is stored under 0 names"):
        checkpoint.stored_name("model.layers.9.w")
    with pytest.raises(UnsupportedModel, match="stored under 0 names"):
        checkpoint.stored_name("proj.weight")  # the end of many a name, but of none of its parts
    with pytest.raises(UnsupportedModel, match="stored under 3 names"):
        checkpoint.stored_name("mlp.up_proj.weight")


def test_block_1_is_not_found_in_block_11(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("gpt2", n_layer=12).base_model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for block in range(12):
        assert checkpoint.stored_name(f"transformer.h.{block}.mlp.c_fc.weight") == f"h.{block}.mlp.c_fc.weight"


# -- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_is_loaded_for_inference(
    family: str, checkpoint_dir: Callable[[str], Path], dtype: torch.dtype
) -> None:
    model = load(open_checkpoint(checkpoint_dir(family)), dtype)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    hooked = [name for name, module in model.named_modules() if "forward" in vars(module)]
    assert not hooked, "the recorder takes the forward of instances for its own"


def test_missing_weights_are_refused_by_name(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"^--model: .* lacks weights of the model: model\.layers\.1\.mlp\.up_proj\."):
        load(open_checkpoint(folder))


def test_weights_of_another_shape_are_refused_by_name(folder: Path) -> None:
    change_config(folder, intermediate_size=64)
    with pytest.raises(BadInput, match=r"mlp\.down_proj\.weight \(has \[32, 56\], expected \[32, 64\]\)") as error:
        load(open_checkpoint(folder))
    assert len(str(error.value).splitlines()) == 1


def test_more_blocks_than_are_stored_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(BadInput, match=r"lacks weights of the model: model\.layers\.3\."):
        load(open_checkpoint(folder))


def test_an_empty_model_has_the_shapes_and_no_weights(family: str, checkpoint_dir: Callable[[str], Path]) -> None:
    checkpoint = open_checkpoint(checkpoint_dir(family))
    empty, full = empty_model(checkpoint), load(checkpoint)
    shapes = {name: parameter.shape for name, parameter in empty.named_parameters()}
    assert shapes == {name: parameter.shape for name, parameter in full.named_parameters()}
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}


def test_an_empty_model_counts_all_experts(moe_family: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(moe_family)
    model.save_pretrained(tmp_path)
    full = Stream(model)
    keep_routers_dense(model)
    _, blocks = find_blocks(empty_model(open_checkpoint(tmp_path)))
    for empty, own in zip(blocks, full.blocks, strict=True):
        shapes = [
            {path: weight_of(module).shape for path, module in find_linears(block).items()} for block in (empty, own)
        ]
        assert shapes[0] == shapes[1]
    experts = [module for module in find_linears(blocks[2]).values() if isinstance(module, Expert)]
    assert len(experts) == 8
    assert {expert.weight.device.type for expert in experts} == {"meta"}
