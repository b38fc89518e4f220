"""The fused rotary embedding equals the one that it replaces, bit for bit, on a GPU."""

import math

import pytest
import torch

from neuronal_ray.core.kernels.rotary import rotary, rotary_reference, takes


def case(
    dtype: torch.dtype, *, heads: int, features: int, rows: int, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make strided heads, as in attention."""
    source = torch.Generator().manual_seed(heads * features)
    states = torch.randn(2, 7, heads, features, generator=source).to(device, dtype).transpose(1, 2)
    angles = torch.rand(rows, 7, features // 2, generator=source) * 2 * math.pi
    angles = torch.cat((angles, angles), dim=-1)
    return states, angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def test_the_reference_turns_pairs_by_their_angles() -> None:
    states, cos, sin = case(torch.float64, heads=2, features=6, rows=2)
    found = rotary_reference(states, cos, sin)
    for sequence in range(2):
        for token in range(7):
            for pair in range(3):
                turn = torch.complex(cos[sequence, token, pair], sin[sequence, token, pair])
                for head in range(2):
                    before = torch.complex(*(states[sequence, head, token, pair + offset] for offset in (0, 3)))
                    after = torch.complex(*(found[sequence, head, token, pair + offset] for offset in (0, 3)))
                    torch.testing.assert_close(after, before * turn)


def test_a_cpu_has_no_kernel_for_it() -> None:
    assert not takes(*case(torch.float32, heads=2, features=8, rows=1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "features"), [(1, 2), (3, 80), (32, 128), (5, 256)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_gpu_gives_the_references_bits(dtype: torch.dtype, heads: int, features: int, rows: int) -> None:
    states, cos, sin = case(dtype, heads=heads, features=features, rows=rows, device="cuda")
    assert takes(states, cos, sin)
    found = rotary(states, cos, sin)
    assert torch.equal(found, rotary_reference(states, cos, sin))
    assert found.stride() == states.stride()


@pytest.mark.gpu
def test_unsupported_tensors_are_left_to_torch() -> None:
    states, cos, sin = case(torch.float32, heads=2, features=8, rows=1, device="cuda")
    assert not takes(states, cos.double(), sin.double())
    assert not takes(states, cos[..., :4], sin[..., :4])
    assert not takes(states.transpose(2, 3), cos, sin)
    assert not takes(states.clone().requires_grad_(), cos, sin)
