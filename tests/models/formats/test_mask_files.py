"""Masks zero the same weights in another copy of a model, and masks of another model are refused."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.checkpoint import Checkpoint, open_checkpoint
from neuronal_ray.models.formats.mask_files import apply_masks, check_masks, open_masks, write_masks
from neuronal_ray.models.output_files import copy_whole, stored_linears

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
UP = "model.layers.1.mlp.up_proj.weight"


def prune(checkpoint: Checkpoint, target: Path) -> Checkpoint:
    """Copy a checkpoint with zeros of both signs in its linears, and zeros in its embedding, which is no linear."""
    target.mkdir()
    written = copy_whole(checkpoint, target, advance=lambda _: None)
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(target / "model.safetensors")
    names = stored_linears(written)
    for name in names:
        tensors[name] = tensors[name] * (torch.rand(tensors[name].shape, generator=generator) > 0.6)  # -0 too
    embedding = next(name for name in tensors if "emb" in name or "wte" in name)
    tensors[embedding][1] = 0
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss", "phi3"])
def test_another_copy_gets_the_same_zeros(name: str, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "dense")
    pruned = prune(open_checkpoint(tmp_path / "dense"), tmp_path / "pruned")
    names = stored_linears(pruned)
    file = tmp_path / "masks.safetensors"
    size = write_masks(pruned, names, file, record={}, advance=lambda _: None)
    assert size == file.stat().st_size
    make_model(name, seed=1).to(dtype).save_pretrained(tmp_path / "other")

    other, masks = open_checkpoint(tmp_path / "other"), open_masks(file)
    check_masks(masks, other)
    (tmp_path / "out").mkdir()
    zeros = apply_masks(masks, copy_whole(other, tmp_path / "out", advance=lambda _: None), advance=lambda _: None)

    sparse, before, found = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "other", "out"))
    assert set(masks.shapes) == set(names)
    assert zeros == sum(int((sparse[name] == 0).sum()) for name in names)
    for stored, tensor in found.items():
        expected = before[stored].masked_fill(sparse[stored] == 0, 0) if stored in names else before[stored]
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected), stored


@pytest.fixture
def folder(make_model: MakeModel, tmp_path: Path) -> Path:
    """`dense` and `masks.safetensors`."""
    make_model("llama").save_pretrained(tmp_path / "dense")
    pruned = prune(open_checkpoint(tmp_path / "dense"), tmp_path / "pruned")
    write_masks(pruned, stored_linears(pruned), tmp_path / "masks.safetensors", record={}, advance=lambda _: None)
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput, match=r"^--masks: ") as error:
        check_masks(open_masks(folder / "masks.safetensors"), open_checkpoint(folder / "dense"))
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_a_model_of_other_shapes_is_refused(folder: Path, make_model: MakeModel) -> None:
    shutil.rmtree(folder / "dense")
    make_model("llama", intermediate_size=48).save_pretrained(folder / "dense")
    assert "has shape [56, 32], the model's tensor [48, 32]" in refusal(folder)


def test_a_model_of_other_names_is_refused(folder: Path, make_model: MakeModel) -> None:
    shutil.rmtree(folder / "dense")
    make_model("gpt2").save_pretrained(folder / "dense")
    assert "has no tensor model.layers.0." in refusal(folder)


def test_another_configuration_of_equal_shapes_is_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = json.loads((folder / "dense" / "config.json").read_text())
    (folder / "dense" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    with caplog.at_level(logging.WARNING, "neuronal_ray"):
        check_masks(open_masks(folder / "masks.safetensors"), open_checkpoint(folder / "dense"))
    assert "another config.json" in caplog.text


def test_no_mask_file_and_another_file_are_refused(folder: Path) -> None:
    file = folder / "masks.safetensors"
    file.unlink()
    assert "does not exist, expected a file" in refusal(folder)
    shutil.copyfile(folder / "dense" / "model.safetensors", file)
    assert "is not of format 'neuronal_ray masks', version 1" in refusal(folder)


@pytest.mark.parametrize("length", [0, 50, -1])
def test_a_truncated_file_is_refused(folder: Path, length: int) -> None:
    file = folder / "masks.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    assert "truncated" in refusal(folder)


def test_a_changed_bit_is_found(folder: Path) -> None:
    file = folder / "masks.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "has another checksum" in refusal(folder)
