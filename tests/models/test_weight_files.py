"""The weights that are used are transformers' choice, in results and copies too; others are named."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models import checkpoint as checkpoints
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.models.output_files import copy_whole
from neuronal_ray.models.weight_files import INDEX, SINGLE, find_weight_files

NAME = "model.layers.0.mlp.up_proj.weight"


def both(sharded: Path, folder: Path) -> Path:
    """Put a single file of other weights beside an index and its shards."""
    tensors = load_file(folder / SINGLE)
    tensors[NAME] += 1
    save_file(tensors, sharded / SINGLE, metadata={"format": "pt"})
    return sharded


def test_the_file_of_two_sets_is_the_one_that_transformers_loads(
    sharded: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = both(sharded, folder)
    checkpoints._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        checkpoint = open_checkpoint(path)
        open_checkpoint(path)
    assert checkpoint.files == [path / SINGLE]
    own = AutoModelForCausalLM.from_pretrained(path).get_parameter(NAME).data
    assert torch.equal(own, load_file(path / SINGLE)[NAME])
    (line,) = [record.getMessage() for record in caplog.records if "ignored" in record.getMessage()]
    assert f"{SINGLE} is used" in line, line
    assert INDEX not in line or line.index(SINGLE) < line.index(INDEX), line


def test_a_copy_has_only_the_weights_that_are_used(sharded: Path, folder: Path, tmp_path: Path) -> None:
    path, target = both(sharded, folder), tmp_path / "copy"
    (path / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    target.mkdir()
    copy = copy_whole(open_checkpoint(path), target, advance=lambda _: None)
    weights = sorted(file.name for file in target.iterdir() if "safetensors" in file.name or "index" in file.name)
    assert weights == [SINGLE]
    assert copy.index is None
    assert open_checkpoint(target).tensors == copy.tensors


def test_a_sharded_copy_has_its_index_and_nothing_beside_it(sharded: Path, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / SINGLE, sharded / "consolidated.safetensors")
    (tmp_path / "copy").mkdir()
    copy = copy_whole(open_checkpoint(sharded), tmp_path / "copy", advance=lambda _: None)
    assert find_weight_files(sharded).ignored == ("consolidated.safetensors",)
    assert copy.index == tmp_path / "copy" / INDEX
    assert find_weight_files(copy.path).ignored == ()
    assert copy.files == list(find_weight_files(copy.path).paths)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{nope", "not JSON"),
        ("[]", "object"),
        ('{"metadata": {}}', "weight_map is missing"),
        ('{"metadata": {}, "weight_map": []}', "weight_map"),
        ('{"metadata": {}, "weight_map": {}}', "lists no tensors"),
        ('{"metadata": {}, "weight_map": {"a": 3}}', "weight_map.a"),
        ('{"metadata": {}, "weight_map": {"a": "../model.safetensors"}}', "in its directory"),
        ('{"metadata": {}, "weight_map": {"a": "/etc/model.safetensors"}}', "in its directory"),
        ('{"metadata": {}, "weight_map": {"a": "pickle.bin"}}', "in its directory"),
        ('{"metadata": {}, "weight_map": {"a": "lost.safetensors"}}', "lost.safetensors is missing"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_cannot_be_used_is_refused(folder: Path, text: str, expected: str) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(text)
    with pytest.raises(BadInput, match=r"^--model: ") as error:
        open_checkpoint(folder)
    assert expected in str(error.value)
    assert len(str(error.value).splitlines()) == 1, error.value


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file(tensors | load_file(second), second, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=f"is in .*{first.name} and in {second.name}"):
        open_checkpoint(sharded)


def test_weights_under_a_name_of_the_configuration_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="transformers_weights"):
        open_checkpoint(folder)
