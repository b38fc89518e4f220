"""Is every unusable checkpoint refused in one line, and does a pruned copy differ in its zeros only?"""

import json
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models import tensor_copies as copies
from neuronal_ray.models.blocks import Stream, find_blocks, find_linears, weight_of
from neuronal_ray.models.checkpoint import Checkpoint, empty_model, load_model, open_checkpoint, resolve_model
from neuronal_ray.models.experts import Expert
from neuronal_ray.models.output_files import Part, copy_rest, stored_tensors
from neuronal_ray.models.tensor_copies import copy_tensors, new_part, write_weights, zero_masked

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
ITEMS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
TOKENS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture
def folder(checkpoint_dir: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a LLaMA checkpoint, to be damaged."""
    path = tmp_path / "damaged"
    shutil.copytree(checkpoint_dir("llama"), path)
    return path


def refusal(path: Path, kind: type[BadInput] = BadInput) -> str:
    """The one line with which the checkpoint is refused."""
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
def test_an_id_that_the_hub_does_not_give_is_refused_in_one_line(name: str) -> None:
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
def test_a_configuration_that_says_nothing_useful_is_refused(folder: Path, text: str, expected: str) -> None:
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
    assert "only safetensors checkpoints are read" in refusal(folder)


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


@pytest.mark.parametrize("text", ["{nope", "{}", "[]", '{"weight_map": []}'])
def test_a_garbage_index_is_refused(folder: Path, text: str) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    assert "not the index of a sharded checkpoint" in refusal(folder)


# -- shards


@pytest.fixture
def sharded(make_model: MakeModel, tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    make_model("llama").save_pretrained(path, max_shard_size="20KB")
    return path


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


# -- the copy


def copy_checkpoint(checkpoint: Checkpoint, target: Path) -> Checkpoint:
    """All of a checkpoint in one file."""
    part = Part(file="model.safetensors", blocks=range(0), names=tuple(checkpoint.tensors))
    written = new_part(checkpoint, part, target)
    copy_tensors(checkpoint, written, part.names)
    copy_rest(checkpoint, [part], target)
    return written


def test_a_copy_takes_what_a_model_needs_and_no_foreign_weights(folder: Path, tmp_path: Path) -> None:
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    wanted |= {"spiece.model", "chat_template.jinja", "modeling_own.py"}
    foreign = {"consolidated.safetensors", "pytorch_model.bin", "model.gguf", "tf_model.h5", ".gitattributes"}
    for name in wanted | foreign:
        if not (folder / name).exists():
            (folder / name).write_text(name)
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    target = tmp_path / "copy"
    target.mkdir()
    copy_checkpoint(open_checkpoint(folder), target)
    assert {path.name for path in target.iterdir()} == wanted
    assert all((target / name).read_bytes() == (folder / name).read_bytes() for name in wanted)


def one_tensor(folder: Path, target: Path, tensor: torch.Tensor) -> Checkpoint:
    """The copy in `target` of a checkpoint that holds `tensor` as "w" between two others."""
    bystander = torch.full((3,), 7.0)
    tensors = {"a": bystander, "w": tensor.contiguous(), "z": bystander.clone()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    target.mkdir()
    return copy_checkpoint(open_checkpoint(folder), target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_weights_become_zero_and_all_other_bits_stay(
    folder: Path, tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_PIECE_BYTES", 56)  # many, and the last one short
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randn(40, 30, generator=generator).to(dtype)
    tensor[0, :6] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-7], dtype=dtype)
    tensor[1, :2] = torch.tensor([0.0, -0.0], dtype=dtype)
    mask = torch.rand(40, 30, generator=generator) < 0.7
    mask[0] = False
    mask[1] = True
    checkpoint = one_tensor(folder, tmp_path / "copy", tensor)
    assert checkpoint.tensors["w"].shape == (40, 30)
    assert checkpoint.tensors["w"].dtype in ITEMS
    assert ITEMS[checkpoint.tensors["w"].dtype] == dtype
    zeros = zero_masked(checkpoint, checkpoint, {"w": mask})
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    before, after = tensor.view(BITS[dtype]), saved["w"].view(BITS[dtype])
    assert torch.equal(after[~mask], before[~mask]), "a kept weight has changed"
    assert not after[mask].any(), "a removed weight is no positive zero"
    assert zeros == {"w": int((saved["w"] == 0).sum())}
    assert zeros["w"] == int(mask.sum()) + 2, "the two zeros among the kept weights count, the removed ones once"
    assert saved["a"].tolist() == saved["z"].tolist() == [7.0] * 3
    assert torch.equal(load_file(folder / "model.safetensors")["w"].view(BITS[dtype]), before), "the source changed"
    sizes = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "copy")]
    assert sizes[0] == sizes[1]


def test_a_tensor_masked_on_its_way_is_one_masked_in_its_copy(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_PIECE_BYTES", 1024)
    checkpoint = open_checkpoint(sharded)
    files = [tmp_path / name for name in ("at once", "in its copy")]
    for folder in files:
        folder.mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand(checkpoint.tensors[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    part = Part(file="model.safetensors", blocks=range(0), names=tuple(checkpoint.tensors))
    written = new_part(checkpoint, part, files[0])
    zeros = zero_masked(checkpoint, written, {name: mask})
    copy_tensors(checkpoint, written, set(part.names) - {name})
    copied = copy_checkpoint(checkpoint, files[1])
    assert zero_masked(copied, copied, {name: mask}) == zeros == {name: int(mask.sum())}
    assert (files[0] / part.file).read_bytes() == (files[1] / part.file).read_bytes()


def test_a_source_that_has_become_shorter_is_said(folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(folder)
    os.truncate(folder / "model.safetensors", 2000)
    with pytest.raises(OSError, match=r"^--model: a file has become shorter since it was opened$"):
        copy_checkpoint(checkpoint, tmp_path)


def test_files_stay_open_until_nobody_writes_after_an_error(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_PIECE_BYTES", 1024)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    others: list[bool] = []
    first = threading.Lock()
    write = os.pwrite

    def fail_once(file: int, data: memoryview, offset: int) -> int:
        if first.acquire(blocking=False):
            raise OSError(28, "No space left on device")
        time.sleep(0.1)
        others.append(stat.S_ISREG(os.fstat(file).st_mode))
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", fail_once)
    with pytest.raises(OSError, match="No space left on device"):
        copy_checkpoint(open_checkpoint(sharded), tmp_path)
    count = len(others)
    assert all(others)
    assert count, "others were at work"
    time.sleep(0.3)
    assert len(others) == count, "somebody went on"


def test_a_mask_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint = one_tensor(folder, tmp_path / "copy", torch.ones(4, 3))
    with pytest.raises(UnsupportedModel, match=r"^--model: w is stored as \(4, 3\), the model has \(3, 4\)$"):
        zero_masked(checkpoint, checkpoint, {"w": torch.ones(3, 4, dtype=torch.bool)})
    assert load_file(tmp_path / "copy" / "model.safetensors")["w"].tolist() == [[1.0] * 3] * 4


def test_weights_are_zeroed_in_their_shards(sharded: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    target = tmp_path / "copy"
    target.mkdir()
    written = copy_checkpoint(checkpoint, target)
    names = [f"model.layers.{block}.mlp.{path}_proj.weight" for block in range(3) for path in ("up", "down")]

    def mask_of(name: str) -> torch.Tensor:
        rows, columns = checkpoint.tensors[name].shape
        return (torch.arange(columns) % 2 == 0).expand(rows, columns)

    zeros = zero_masked(written, written, {name: mask_of(name) for name in names})
    assert zeros == dict.fromkeys(names, 32 * 56 // 2)
    own, pruned = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (sharded, target))
    for name, weight in own.items():
        wanted = torch.where(mask_of(name), 0, weight) if name in names else weight
        assert torch.equal(pruned[name], wanted), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_new_weights_are_rounded_to_the_stored_dtype(folder: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(30, 40, generator=generator)
    weight[:3] = 0
    weight[3, :4] = -0.0
    checkpoint = one_tensor(folder, tmp_path / "copy", torch.ones(40, 30).to(dtype))
    zeros = write_weights(checkpoint, checkpoint, {"w": weight.t()})
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert saved["w"].dtype == dtype
    expected = weight.t().contiguous().to(dtype)
    expected[expected == 0] = 0.0  # no zero is negative: to export's packed form that would be a value
    assert torch.equal(saved["w"].view(BITS[dtype]), expected.view(BITS[dtype]))
    assert zeros == {"w": 3 * 40 + 4}
    assert saved["a"].tolist() == saved["z"].tolist() == [7.0] * 3
    assert load_file(folder / "model.safetensors")["w"].eq(1).all(), "the source changed"


def test_new_weights_that_cannot_be_stored_are_refused(folder: Path, tmp_path: Path) -> None:
    half = one_tensor(folder, tmp_path / "half", torch.ones(2, 2).half())
    with pytest.raises(BadInput, match=r"^--model: new weights of w are not finite in the stored dtype F16$"):
        write_weights(half, half, {"w": torch.full((2, 2), 1e6)})
    with pytest.raises(UnsupportedModel, match=r"w is stored as \(2, 2\), the model has \(4,\)"):
        write_weights(half, half, {"w": torch.ones(4)})
    assert load_file(tmp_path / "half" / "model.safetensors")["w"].eq(1).all()
    whole = one_tensor(folder, tmp_path / "whole", torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(UnsupportedModel, match="w is stored as I32, expected one of F16, BF16, F32, F64"):
        write_weights(whole, whole, {"w": torch.ones(2, 2)})


# -- from the model's linears to the checkpoint's tensors


def random_masks(stream: Stream, block: int) -> dict[str, torch.Tensor]:
    """A mask for each linear of the block, by the name of its weight."""
    generator = torch.Generator().manual_seed(block)
    return {
        f"{stream.blocks_name}.{block}.{path}.weight": torch.rand(module.weight.shape, generator=generator) < 0.5
        for path, module in find_linears(stream.blocks[block]).items()
    }


def check_pruned_copy(path: Path, target: Path) -> set[str]:
    """Mask all linears of a checkpoint in the copy and in memory: the same weights. Returns the names written."""
    checkpoint = open_checkpoint(path)
    target.mkdir()
    written = copy_checkpoint(checkpoint, target)
    stream = Stream(load(checkpoint))
    zeros: dict[str, int] = {}
    removed = 0
    for block in range(len(stream.blocks)):
        masks = random_masks(stream, block)
        zeros |= zero_masked(written, written, stored_tensors(stream.model, masks))
        for name, mask in masks.items():
            module = stream.model.get_submodule(name.removesuffix(".weight"))
            module.weight.data[mask] = 0  # an expert's is a view of the model's parameter
        removed += sum(int(mask.sum()) for mask in masks.values())
    assert sum(zeros.values()) == removed
    wanted, saved = stream.model.state_dict(), load(open_checkpoint(target)).state_dict()
    assert list(wanted) == list(saved)
    different = [name for name in wanted if not torch.equal(saved[name], wanted[name])]
    assert not different
    before, after = (
        {name: tensor for file in open_checkpoint(folder).files for name, tensor in load_file(file).items()}
        for folder in (path, target)
    )
    written = {checkpoint.stored_name(name) for name in zeros}
    assert all(torch.equal(after[name], before[name]) for name in before if name not in written)
    return written


def test_experts_are_masked_as_they_are_stored(moe_family: str, make_model: MakeModel, tmp_path: Path) -> None:
    make_model(moe_family).save_pretrained(tmp_path / "own")
    written = check_pruned_copy(tmp_path / "own", tmp_path / "pruned")
    stored_one_by_one = {
        "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
        "qwen3_moe": "model.layers.1.mlp.experts.3.up_proj.weight",
        "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
        "granitemoe": "model.layers.1.block_sparse_moe.input_linear.weight",
    }
    assert stored_one_by_one.get(moe_family, next(iter(written))) in written, sorted(written)


def test_experts_stored_as_the_model_holds_them_are_masked(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("qwen3_moe")
    model.config.save_pretrained(tmp_path / "own")
    save_file(model.state_dict(), tmp_path / "own" / "model.safetensors", metadata={"format": "pt"})
    written = check_pruned_copy(tmp_path / "own", tmp_path / "pruned")
    assert "model.layers.2.mlp.experts.down_proj" in written


def test_linears_are_masked_in_shards_and_without_prefix(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(open_checkpoint(tmp_path / "shards").files) > 3
    check_pruned_copy(tmp_path / "shards", tmp_path / "pruned shards")
    model = make_model("gpt2")
    model.base_model.save_pretrained(tmp_path / "base")
    assert "h.1.mlp.c_fc.weight" in check_pruned_copy(tmp_path / "base", tmp_path / "pruned base")


def test_weights_of_experts_are_written_as_they_are_stored(make_model: MakeModel, tmp_path: Path) -> None:
    make_model("mixtral").to(torch.bfloat16).save_pretrained(tmp_path / "own")
    checkpoint = open_checkpoint(tmp_path / "own")
    (tmp_path / "new").mkdir()
    written = copy_checkpoint(checkpoint, tmp_path / "new")
    stream = Stream(load(checkpoint))
    weights = {name: torch.randn(mask.shape) * mask for name, mask in random_masks(stream, 1).items()}
    zeros = write_weights(written, written, stored_tensors(stream.model, weights))
    assert sum(zeros.values()) == sum(int((weight == 0).sum()) for weight in weights.values())
    changed = Stream(load(open_checkpoint(tmp_path / "new")))
    for block in (0, 1, 2):
        for path, module in find_linears(changed.blocks[block]).items():
            own = find_linears(stream.blocks[block])[path].weight
            wanted = weights[f"model.layers.1.{path}.weight"].bfloat16().float() if block == 1 else own
            assert torch.equal(module.weight, wanted), (block, path)


def test_all_experts_of_a_stack_must_be_given(make_model: MakeModel, tmp_path: Path) -> None:
    stream = Stream(make_model("mixtral"))
    masks = random_masks(stream, 0)
    del masks["model.layers.0.mlp.experts.2.down_proj.weight"]
    with pytest.raises(AssertionError, match=r"mlp\.experts\.down_proj has other experts"):
        stored_tensors(stream.model, masks)


def test_an_empty_model_counts_all_experts(moe_family: str, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(moe_family)
    model.save_pretrained(tmp_path)
    full = Stream(model)
    _, blocks = find_blocks(empty_model(open_checkpoint(tmp_path)))
    for empty, own in zip(blocks, full.blocks, strict=True):
        shapes = [
            {path: weight_of(module).shape for path, module in find_linears(block).items()} for block in (empty, own)
        ]
        assert shapes[0] == shapes[1]
    experts = [module for module in find_linears(blocks[2]).values() if isinstance(module, Expert)]
    assert len(experts) == 8
    assert {expert.weight.device.type for expert in experts} == {"meta"}
