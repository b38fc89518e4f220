"""A random checkpoint equals what transformers would have saved, for any file size, and is never whole in memory."""

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.checkpoint import load_model, open_checkpoint
from neuronal_ray.models.synthetic import empty_llama, write_random_llama

CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
FILE_BYTES = 2 * 64 * 320 + 1000  # the embedding and little else


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_it_has_the_tensors_that_transformers_expects(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "model", CONFIG, dtype=torch.bfloat16, file_bytes=FILE_BYTES)
    stored = tensors_of(tmp_path / "model")
    expected = empty_llama(**CONFIG).state_dict()
    assert {name: tensor.shape for name, tensor in stored.items()} == {name: t.shape for name, t in expected.items()}
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    checkpoint = open_checkpoint(tmp_path / "model")
    assert checkpoint.config.dtype == torch.bfloat16
    model = load_model(checkpoint, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert bool(model(input_ids=torch.arange(32)[None]).logits.isfinite().all())


def test_weights_are_normal_and_norms_are_one(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "model", CONFIG, dtype=torch.float32)
    for name, tensor in tensors_of(tmp_path / "model").items():
        if tensor.dim() == 1:
            assert bool((tensor == 1).all()), name
            continue
        count = tensor.numel()
        assert float(tensor.std()) == pytest.approx(0.02, rel=5 / count**0.5), name
        assert abs(float(tensor.mean())) < 5 * 0.02 / count**0.5, name
        assert tensor.unique().numel() > 0.99 * count, name


def test_the_content_does_not_depend_on_the_files(tmp_path: Path) -> None:
    write_random_llama(tmp_path / "one", CONFIG, dtype=torch.bfloat16)
    write_random_llama(tmp_path / "many", CONFIG, dtype=torch.bfloat16, file_bytes=FILE_BYTES)
    one, many = (open_checkpoint(tmp_path / name) for name in ("one", "many"))
    assert len(one.files) == 1
    assert len(many.files) > 3
    assert all(file.stat().st_size < FILE_BYTES + 4096 for file in many.files)
    content = [tensors_of(path) for path in (tmp_path / "one", tmp_path / "many")]
    assert set(content[0]) == set(content[1])
    assert all(torch.equal(content[0][name], content[1][name]) for name in content[0])
    blocks = [content[0][f"model.layers.{block}.mlp.up_proj.weight"] for block in range(3)]
    assert not torch.equal(blocks[0], blocks[1])


def test_a_disk_without_room_is_refused_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(BadInput, match=r"--checkpoints: the model.s files take .* 0\.0 GiB free; name"):
        write_random_llama(tmp_path / "model", CONFIG, dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(KeyboardInterrupt):
        write_random_llama(tmp_path / "model", CONFIG, dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())


def test_memory_is_that_of_a_tensor_not_of_the_model(tmp_path: Path) -> None:
    """A model of 260 MB whose largest tensor has 16 MB."""
    code = f"""
import pathlib, torch
from neuronal_ray.cli.memory import peak_bytes, reset_peak
from neuronal_ray.models.synthetic import write_random_llama
config = {CONFIG!r}
write_random_llama(pathlib.Path({str(tmp_path / "small")!r}), config, dtype=torch.float32)
big = {{"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 1024, "num_hidden_layers": 4}}
reset_peak()
before = peak_bytes()
write_random_llama(pathlib.Path({str(tmp_path / "big")!r}), config | big, dtype=torch.float32)
print(peak_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size = sum(file.stat().st_size for file in (tmp_path / "big").glob("*.safetensors"))
    assert size > 230e6
    assert int(done.stdout) < 100e6, f"{int(done.stdout) / 1e6:.0f} MB more than before for {size / 1e6:.0f} MB"
