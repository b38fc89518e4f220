"""The audit of a dense directory counts its zeros and finds every defect."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.blocks import find_blocks, find_linears, weight_of
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.models.experts import split_experts
from neuronal_ray.models.formats.audit import audit

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
UP = "model.layers.1.mlp.up_proj.weight"


def refusal(path: Path) -> str:
    with pytest.raises(BadInput, match=r"^--model: ") as error:
        audit(open_checkpoint(path), advance=lambda _: None)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """Save a LLaMA in one file."""
    make_model("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "falcon"])
def test_zeros_are_those_of_the_linears(name: str, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(name)
    _, blocks = find_blocks(model)
    split_experts(model, blocks)
    generator = torch.Generator().manual_seed(0)
    zeros = size = 0
    for block in blocks:
        for module in find_linears(block).values():
            weight = weight_of(module)
            weight.masked_fill_(torch.rand(weight.shape, generator=generator) < 0.6, 0)
            weight[0, 0] = -0.0
            zeros, size = zeros + int((weight == 0).sum()), size + weight.numel()
    model.to(dtype).save_pretrained(tmp_path)
    told: list[str] = []
    linears = audit(open_checkpoint(tmp_path), advance=told.append)
    assert (sum(linear.zeros for linear in linears), sum(linear.size for linear in linears)) == (zeros, size)
    assert sorted(told) == sorted(load_file(tmp_path / "model.safetensors"))


def test_every_family_has_an_ordinary_configuration(family: str, checkpoint_dir: Callable[[str], Path]) -> None:
    linears = audit(open_checkpoint(checkpoint_dir(family)), advance=lambda _: None)
    assert linears
    assert not any(linear.zeros for linear in linears)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_found(folder: Path, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(folder)


@pytest.mark.parametrize("key", ["neuronal_ray", "sparsity_config", "compression_config", "pruning"])
def test_a_key_that_is_not_transformers_is_found(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: {}}))
    assert key in refusal(folder)
    assert AutoConfig.from_pretrained(folder).model_type == "llama", "transformers itself takes it"


def test_a_weight_that_is_not_there_is_found(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[UP]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert UP in refusal(folder)


@pytest.mark.parametrize("listed", [{UP: "shard.safetensors", "more": "shard.safetensors"}, {}])
def test_an_index_that_lists_other_tensors_is_found(folder: Path, listed: dict[str, str]) -> None:
    names = [name for name in load_file(folder / "model.safetensors") if name != UP]
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "shard.safetensors") | listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "disagree about 1 tensors" in refusal(folder)
