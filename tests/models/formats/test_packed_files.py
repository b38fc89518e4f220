"""A packed model is restored bit for bit, takes the stated number of bytes, and any damage is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import neuronal_ray
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.models.companion_files import copy_companions
from neuronal_ray.models.formats import packed_files as packed_module
from neuronal_ray.models.formats.packed_files import open_packed, packed_bytes, write_packed
from neuronal_ray.models.formats.packed_loading import load_packed
from neuronal_ray.models.tensor_files import CHECKSUMS

pytestmark = pytest.mark.usefixtures("one_thread")

MakeModel = Callable[..., PreTrainedModel]
UP = "model.layers.1.mlp.up_proj.weight"


def save_sparse(model: PreTrainedModel, path: Path, *, dtype: torch.dtype, rate: float = 0.7, **how: str) -> Path:
    """Save the model with zeros in every matrix and stack of the blocks, some of them negative."""
    generator = torch.Generator().manual_seed(0)
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and any(part.isdecimal() for part in name.split(".")):
            parameter.data.masked_fill_(torch.rand(parameter.shape, generator=generator) < rate, 0)
            parameter.data.flatten()[:3] = -0.0
    model.save_pretrained(path, **how)
    return path


def pack_folder(dense: Path, target: Path) -> Path:
    target.mkdir()
    checkpoint = open_checkpoint(dense)
    copy_companions(checkpoint.path, target)
    write_packed(checkpoint, target, advance=lambda _: None)
    return target


def bits_of(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, bytes]]:
    return {
        name: (tensor.dtype, tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def llama(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a sparse LLaMA of two files as `dense` and `packed`; tests must not change them."""
    folder = tmp_path_factory.mktemp("llama")
    save_sparse(make_model("llama"), folder / "dense", dtype=torch.bfloat16, max_shard_size="25KB")
    assert len(list((folder / "dense").glob("*.safetensors"))) > 1
    pack_folder(folder / "dense", folder / "packed")
    return folder


@pytest.fixture
def damaged(llama: Path, tmp_path: Path) -> Path:
    """Copy the packed LLaMA, to be damaged."""
    shutil.copytree(llama / "packed", tmp_path / "packed")
    return tmp_path / "packed"


def file_with(folder: Path, name: str) -> Path:
    """Return the packed file that has the tensor `name`."""
    return next(file for file in sorted(folder.glob("packed*")) if name in safe_open(file, "pt").keys())  # noqa: SIM118


def change(file: Path, **metadata: str) -> None:
    """Rewrite a packed file with changed metadata."""
    with safe_open(file, "pt") as opened:
        words = opened.metadata() | metadata
    save_file(load_file(file), file, metadata=words)


def flip(file: Path, name: str) -> None:
    """Change one bit of a tensor in place."""
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + begin] ^= 1
    file.write_bytes(content)


def refusal(path: Path) -> str:
    with pytest.raises(BadInput, match=r"^load_packed: ") as error:
        load_packed(path)
    message = str(error.value)
    assert len(message.splitlines()) == 1, message
    return message


# -- there and back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_model_comes_back_bit_for_bit(name: str, dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    dense = save_sparse(make_model(name), tmp_path / "dense", dtype=dtype)
    found = load_packed(pack_folder(dense, tmp_path / "packed"))
    expected = AutoModelForCausalLM.from_pretrained(dense)
    assert bits_of(found) == bits_of(expected)
    assert (type(found), found.dtype, found.training) == (type(expected), dtype, False)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    tokens = torch.arange(3, 15)[None]
    assert torch.equal(found(input_ids=tokens).logits, expected(input_ids=tokens).logits)


def test_a_checkpoint_of_several_files_comes_back(llama: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama / "dense")
    assert bits_of(neuronal_ray.load_packed(str(llama / "packed"))) == bits_of(expected)
    assert len(open_packed(llama / "packed").files) == len(list((llama / "dense").glob("*.safetensors")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_another_dtype_is_that_of_from_pretrained(llama: Path, dtype: torch.dtype) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama / "dense", dtype=dtype)
    assert bits_of(load_packed(llama / "packed", dtype=dtype)) == bits_of(expected)


def test_without_a_dtype_in_the_configuration_the_tensors_decide(llama: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(llama / "dense", dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "dtype"}))
    found = load_packed(pack_folder(dense, tmp_path / "packed"))
    assert bits_of(found) == bits_of(AutoModelForCausalLM.from_pretrained(dense))


def test_tied_embeddings_stay_tied(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=True)
    dense = save_sparse(model, tmp_path / "dense", dtype=torch.float32)
    found = load_packed(pack_folder(dense, tmp_path / "packed"))
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert bits_of(found) == bits_of(AutoModelForCausalLM.from_pretrained(dense))


# -- size


def test_its_size_is_bits_and_values(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama", hidden_size=128, intermediate_size=224)
    dense = save_sparse(model, tmp_path / "dense", dtype=torch.bfloat16)
    opened = open_packed(pack_folder(dense, tmp_path / "packed"))
    sparse = {name: one for name, one in opened.tensors.items() if one.bits is not None}
    assert {name for name in sparse if "_proj" in name} == {name for name in opened.tensors if "_proj" in name}
    for name, tensor in load_file(dense / "model.safetensors").items():
        kept = int((tensor.view(torch.int16) != 0).sum())
        whole = packed_bytes(tensor.numel(), kept, 2)
        assert (name in sparse) == (whole < 2 * tensor.numel())
        assert opened.tensors[name].num_bytes == (whole if name in sparse else 2 * tensor.numel())
        assert 0 <= opened.tensors[name].num_bytes - opened.tensors[name].least_bytes < 8
    size, kept = sum(one.size for one in sparse.values()), sum(one.kept for one in sparse.values())
    share = sum(one.num_bytes for one in sparse.values()) / (2 * size)
    assert share == pytest.approx(kept / size + 1 / 16, rel=0.01)


def test_a_dense_tensor_stays_as_it_was(llama: Path) -> None:
    embedding = "model.embed_tokens.weight"
    file = file_with(llama / "packed", embedding)
    dense = next(path for path in (llama / "dense").glob("*.safetensors") if embedding in load_file(path))
    assert torch.equal(load_file(file)[embedding], load_file(dense)[embedding])


def test_other_readers_find_tensors_aligned(llama: Path) -> None:
    for file in (llama / "packed").glob("packed*"):
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header.pop("__metadata__")
        begins = {name: entry["data_offsets"][0] for name, entry in header.items()}
        values = {name: begin for name, begin in begins.items() if not name.endswith(".bits")}
        assert length % 8 == 0
        assert all(begin % 2 == 0 for begin in values.values()), values
        assert set(load_file(file)) == set(header)


def test_a_few_tensors_are_read_ahead_not_all(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    pack_one = packed_module._pack_one

    def counted(name: str, stored: packed_module.Stored) -> list[packed_module.Written]:
        read.append(name)
        return pack_one(name, stored)

    monkeypatch.setattr(packed_module, "_pack_one", counted)
    tensors = open_checkpoint(llama / "dense").tensors
    stream = packed_module._packed(tensors)
    next(stream)
    assert len(read) <= packed_module._THREADS + 1 < len(tensors)
    stream.close()


# -- refusals


def test_a_folder_without_packed_files_is_refused(llama: Path) -> None:
    assert "no packed.safetensors" in refusal(llama / "dense")


@pytest.mark.parametrize("length", [0, 7, 100, -1000, -1])
def test_a_truncated_file_is_refused(damaged: Path, length: int) -> None:
    file = file_with(damaged, f"{UP}.bits")
    file.write_bytes(file.read_bytes()[:length])
    assert "truncated" in refusal(damaged)


def test_a_missing_file_is_refused(damaged: Path) -> None:
    file_with(damaged, f"{UP}.bits").unlink()
    assert "incomplete" in refusal(damaged)


def test_another_configuration_is_refused(damaged: Path) -> None:
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "another config.json" in refusal(damaged)
    (damaged / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    load_packed(damaged)


def test_a_file_of_another_model_is_refused(damaged: Path) -> None:
    change(file_with(damaged, f"{UP}.bits"), tensors="0" * 64)
    assert "another model" in refusal(damaged)


def test_a_file_of_the_same_model_with_other_weights_is_refused(
    damaged: Path, make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model("llama", seed=1)
    other = pack_folder(
        save_sparse(model, tmp_path / "other", dtype=torch.bfloat16, max_shard_size="25KB"), tmp_path / "other-packed"
    )
    file = file_with(damaged, f"{UP}.bits")
    shutil.copyfile(other / file.name, file)
    assert "another model" in refusal(damaged)


@pytest.mark.parametrize("words", [{"format": "pt"}, {"version": "2"}])
def test_another_format_or_version_is_refused(damaged: Path, words: dict[str, str]) -> None:
    change(file_with(damaged, f"{UP}.bits"), **words)
    assert "is not of format 'neuronal_ray packed', version 1" in refusal(damaged)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"shapes": "{"}, "shapes in its header: not JSON"),
        ({"shapes": "[1]"}, "shapes in its header: "),
        ({"shapes": "[" * 100_000}, "shapes in its header: nested too deeply"),
        ({"shapes": f'{{"{UP}": [-3]}}'}, f"shapes in its header: {UP}.0: -3"),
        ({CHECKSUMS: f'{{"{UP}": "x"}}'}, f"{CHECKSUMS} in its header: {UP}: 'x'"),
        ({CHECKSUMS: "{}"}, "its header does not describe a packed model"),
        ({"shapes": f'{{"{UP}": [3]}}'}, "its header does not describe a packed model"),
    ],
)
def test_a_header_that_contradicts_itself_is_refused(damaged: Path, words: dict[str, str], expected: str) -> None:
    change(file_with(damaged, f"{UP}.bits"), **words)
    assert expected in refusal(damaged)


def test_a_lost_bit_is_found_before_anything_is_built(damaged: Path) -> None:
    flip(file_with(damaged, f"{UP}.bits"), f"{UP}.bits")
    with pytest.raises(BadInput, match=rf"^load_packed: .* is damaged: {UP} has [0-9,]+ bits for [0-9,]+ values$"):
        open_packed(damaged)


@pytest.mark.parametrize("name", [f"{UP}.values", "model.embed_tokens.weight"])
def test_a_changed_value_is_found_by_its_checksum(damaged: Path, name: str) -> None:
    flip(file_with(damaged, name), name)
    open_packed(damaged)
    assert "have another checksum" in refusal(damaged)


def test_names_that_packing_would_confuse_are_refused(llama: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(llama / "dense", dense)
    (dense / "model.safetensors.index.json").unlink()
    for file in dense.glob("*.safetensors"):
        file.unlink()
    save_file({"one": torch.zeros(8), "one.bits": torch.zeros(8)}, dense / "model.safetensors")
    with pytest.raises(
        BadInput, match=r"^--model: one cannot be packed: one\.bits or one\.values is a tensor as well$"
    ):
        write_packed(open_checkpoint(dense), tmp_path, advance=lambda _: None)


def test_the_package_has_no_other_names() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_zipped'"):
        _ = neuronal_ray.load_zipped
