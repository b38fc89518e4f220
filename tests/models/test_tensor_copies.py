"""Copying tensors unchanged, masked or replaced: all other bits stay, and the source does not change."""

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import copy_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models import tensor_copies as copies
from neuronal_ray.models.checkpoint import Checkpoint, open_checkpoint
from neuronal_ray.models.output_files import OutputFile
from neuronal_ray.models.tensor_copies import begin_output_file, copy_tensors, write_weights, zero_masked

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
ITEMS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def one_tensor(folder: Path, target: Path, tensor: torch.Tensor) -> Checkpoint:
    """Copy a checkpoint that holds `tensor` as "w" between two others to `target`."""
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


def test_masking_while_copying_equals_masking_the_copy(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "_PIECE_BYTES", 1024)
    checkpoint = open_checkpoint(sharded)
    files = [tmp_path / name for name in ("at once", "in its copy")]
    for folder in files:
        folder.mkdir()
    name = "model.layers.1.mlp.up_proj.weight"
    mask = torch.rand(checkpoint.tensors[name].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    part = OutputFile(file="model.safetensors", blocks=range(0), names=tuple(checkpoint.tensors))
    written = begin_output_file(checkpoint, part, files[0])
    zeros = zero_masked(checkpoint, written, {name: mask})
    copy_tensors(checkpoint, written, set(part.names) - {name})
    copied = copy_checkpoint(checkpoint, files[1])
    assert zero_masked(copied, copied, {name: mask}) == zeros == {name: int(mask.sum())}
    assert (files[0] / part.file).read_bytes() == (files[1] / part.file).read_bytes()


def test_a_source_that_has_become_shorter_is_an_error(folder: Path, tmp_path: Path) -> None:
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
