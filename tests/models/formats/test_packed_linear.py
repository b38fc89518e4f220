"""A model with packed linears gives the logits of the dense one, for every family."""

import logging

import pytest
import torch
from conftest import MakeModel
from torch import nn

from neuronal_ray.core.kernels.build import KernelUnavailable, library
from neuronal_ray.core.kernels.packed_rows import pack_rows
from neuronal_ray.models.blocks import find_blocks, find_linears
from neuronal_ray.models.formats import packed_linear
from neuronal_ray.models.formats.packed_linear import PackedLinear, pack_linears


@pytest.fixture(scope="module")
def _kernel() -> None:
    try:
        library()
    except KernelUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def _packable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack on any processor: only products need the kernel."""
    monkeypatch.setattr(packed_linear, "library", lambda: None)


def make_sparse(model: nn.Module) -> int:
    """Remove 70 % of every linear at random; return the number of nn.Linear modules."""
    count = 0
    for block in find_blocks(model)[1]:
        for module in find_linears(block).values():
            if type(module) is nn.Linear:
                mask = torch.rand(module.weight.shape, generator=torch.Generator().manual_seed(count)) < 0.7
                module.weight.data[mask] = 0
                count += 1
    return count


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("tokens", [1, 5, 12], ids="{} tokens".format)
def test_logits_are_the_dense_ones(family: str, make_model: MakeModel, tokens: int) -> None:
    model = make_model(family)
    linears = make_sparse(model)
    ids = torch.randint(1, 60, (1, tokens), generator=torch.Generator().manual_seed(0))
    dense = model(ids).logits
    assert pack_linears(model) == linears
    packed = model(ids).logits
    difference = float((packed - dense).abs().max() / dense.abs().max())
    assert difference < 1e-4, difference


@pytest.mark.usefixtures("_packable")
def test_each_linear_that_gets_smaller_is_packed(make_model: MakeModel, caplog: pytest.LogCaptureFixture) -> None:
    """Of those just below half zeros too, and no linear that would grow."""
    model = make_model("llama", hidden_size=64, intermediate_size=64)
    removed = [0, 0.02, 0.2, 0.45, 0.499, 0.5]
    linears = [module for block in find_blocks(model)[1] for module in find_linears(block).values()]
    for index, module in enumerate(linears):
        flat = module.weight.data.view(-1)
        flat[torch.arange(flat.numel()) % 1000 < 1000 * removed[index % len(removed)]] = 0
    smaller = {module for module in linears if pack_rows(module.weight.detach()).nbytes < module.weight.nbytes}
    assert 0 < len(smaller) < len(linears)
    with caplog.at_level(logging.WARNING):
        assert pack_linears(model) == len(smaller)
    after = [module for block in find_blocks(model)[1] for module in block.modules()]
    assert smaller.isdisjoint(after)
    assert set(linears) - smaller <= set(after)
    left = len(linears) - len(smaller)
    expected = f"pack_linears: {left} of {len(linears)} linears stay dense: {left} (packing makes it no smaller)"
    assert expected in caplog.text


@pytest.mark.usefixtures("_packable")
@pytest.mark.parametrize(("name", "reason"), [("gpt2", "12 (no nn.Linear)"), ("llama", "(float64 on cpu, packed are")])
def test_what_cannot_be_packed_is_said(
    name: str, reason: str, make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert pack_linears(make_model(name).double()) == 0
    assert reason in caplog.text


@pytest.mark.usefixtures("_kernel")
def test_dense_linears_stay(make_model: MakeModel) -> None:
    model = make_model("llama")
    make_sparse(model)
    kept = find_blocks(model)[1][0].self_attn.q_proj
    kept.weight.data.fill_(1.0)
    assert pack_linears(model) == 3 * 7 - 1
    assert type(find_blocks(model)[1][0].self_attn.q_proj) is nn.Linear
    assert type(find_blocks(model)[1][1].self_attn.q_proj) is PackedLinear


def test_without_the_kernel_nothing_changes_and_a_warning_says_why(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unavailable() -> None:
        raise KernelUnavailable("no compiler")

    monkeypatch.setattr(packed_linear, "library", unavailable)
    model = make_model("llama")
    make_sparse(model)
    with caplog.at_level(logging.WARNING):
        assert pack_linears(model) == 0
    assert "no compiler; the linears stay dense" in caplog.text
