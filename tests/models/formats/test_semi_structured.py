"""A 2:4 model is recognized, and gives the dense model's logits on a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import neuronal_ray
from neuronal_ray.cli.errors import BadInput, UnsupportedModel
from neuronal_ray.models.formats.semi_structured import is_two_four, two_four_linears

MakeModel = Callable[..., PreTrainedModel]
HAS_SPARSE_UNITS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
TOLERANCE = 0.02  # of the largest logit: float16 products summed in another order, three blocks deep


def make_two_four(model: PreTrainedModel) -> PreTrainedModel:
    """Keep the two largest of every 4 inputs in the linears of the blocks."""
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers." in name:
            groups = module.weight.data.view(-1, 4)
            groups.scatter_(1, groups.abs().argsort(dim=1)[:, :2], 0)
    return model


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1, 0, 2, 0, 0, 0, 3, 4], True),
        ([0, 0, 0, 0, 0, 0, 0, 0], True),
        ([1, 1, 1, 0, 0, 0, 0, 0], False),
        ([0, 0, 1, 1, 1, 1, 0, 0], True),
        ([0, 1, 1, 1, 1, 0, 0, 0], False),
        ([1, 0, 1, 0, 1, 0], False),
    ],
)
def test_two_of_every_four_aligned_inputs(row: list[float], expected: bool) -> None:
    assert is_two_four(torch.tensor([row, [0.0] * len(row)])) is expected


def test_the_first_linear_that_is_not_2_4_is_named(make_model: MakeModel) -> None:
    model = make_two_four(make_model("llama"))
    assert len(list(two_four_linears(model))) == 3 * 7
    model.model.layers[1].mlp.up_proj.weight.data[3, :3] = 1
    with pytest.raises(
        UnsupportedModel, match=r"^load_semi_structured: block 1 mlp.up_proj is not 2:4 \(2 of every 4 "
    ):
        list(two_four_linears(model))


def test_transposed_weights_are_refused(make_model: MakeModel) -> None:
    with pytest.raises(UnsupportedModel, match=r"^load_semi_structured: block 0 attn\.c_attn is a Conv1D"):
        list(two_four_linears(make_model("gpt2")))


def test_another_device_and_another_dtype_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"^load_semi_structured: cpu has no sparse matrix units, expected a CUDA "):
        neuronal_ray.load_semi_structured(tmp_path / "nowhere", device="cpu")
    with pytest.raises(BadInput, match=r"^load_semi_structured: torch.float32 has no sparse products, expected "):
        neuronal_ray.load_semi_structured(tmp_path / "nowhere", dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_SPARSE_UNITS, reason="no CUDA device with sparse matrix units (compute capability 8.0)")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_gives_the_logits_of_the_dense_model(dtype: torch.dtype, make_model: MakeModel, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 4}
    make_two_four(make_model("llama", **sizes)).to(dtype).save_pretrained(tmp_path)
    found = neuronal_ray.load_semi_structured(tmp_path, dtype=dtype, device="cuda")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, device_map={"": "cuda"})
    tokens = (torch.arange(128, device="cuda") % 60 + 3)[None]
    with torch.no_grad():
        sparse, dense = found(input_ids=tokens).logits.float(), expected(input_ids=tokens).logits.float()
    difference = float((sparse - dense).abs().max() / dense.abs().max())
    tolerance = TOLERANCE * (8 if dtype == torch.bfloat16 else 1)  # three bits less
    assert difference < tolerance, f"{difference:.4f} of the largest logit"
