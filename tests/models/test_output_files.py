"""The files of a pruned model: linears under their stored names and shapes, and the files next to the weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from neuronal_ray.models.blocks import Stream, find_linears
from neuronal_ray.models.checkpoint import Checkpoint, load_model, open_checkpoint
from neuronal_ray.models.output_files import stored_tensors
from neuronal_ray.models.tensor_copies import write_weights, zero_masked

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")


def load(checkpoint: Checkpoint) -> PreTrainedModel:
    return load_model(checkpoint, device=CPU, dtype=torch.float32)


def test_a_copy_takes_what_a_model_needs_and_no_foreign_weights(folder: Path, tmp_path: Path) -> None:
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    wanted |= {"spiece.model", "chat_template.jinja", "modeling_own.py"}
    foreign = {"pytorch_model.bin.index.json", "consolidated.safetensors", "model.gguf"}
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


def random_masks(stream: Stream, block: int) -> dict[str, torch.Tensor]:
    """Return a mask for each linear of the block, by the name of its weight."""
    generator = torch.Generator().manual_seed(block)
    return {
        f"{stream.blocks_name}.{block}.{path}.weight": torch.rand(module.weight.shape, generator=generator) < 0.5
        for path, module in find_linears(stream.blocks[block]).items()
    }


def check_pruned_copy(path: Path, target: Path) -> set[str]:
    """Mask all linears of a checkpoint in a copy and in memory, and compare the weights; return the names written."""
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
