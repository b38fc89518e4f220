"""The compiled kernel agrees with its references for all shapes and dtypes, and explains why it cannot run."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core.kernels import build
from neuronal_ray.core.kernels.packed_rows import (
    DTYPES,
    MOST_VECTORS,
    multiply,
    pack_rows,
    reference_multiply,
    reference_unpack,
    unpack,
)


def can_run() -> str | None:
    """Return why the kernel cannot run here, or None."""
    try:
        build.library()
    except build.KernelUnavailable as reason:
        return str(reason)
    return None


REASON = can_run()
needs_kernel = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def sparse_matrix(rows: int, columns: int, *, rate: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return (weight * (torch.rand(rows, columns, generator=generator) >= rate)).to(dtype)


matrices = st.builds(
    sparse_matrix,
    st.integers(1, 40),
    st.integers(1, 200),
    rate=st.sampled_from([0.0, 0.5, 0.7, 0.95, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)


@given(matrices)
def test_packing_loses_nothing(weight: torch.Tensor) -> None:
    packed = pack_rows(weight)
    assert torch.equal(reference_unpack(packed), weight)
    kept = int(torch.count_nonzero(weight))
    words = -(-weight.shape[1] // 32)
    spare = 64
    expected = weight.shape[0] * (4 * words + 8) + kept * weight.element_size() + spare
    assert packed.nbytes == expected, (packed.nbytes, expected)


@needs_kernel
@given(matrices)
def test_unpacking_is_the_reference_bit_for_bit(weight: torch.Tensor) -> None:
    packed = pack_rows(weight)
    assert torch.equal(unpack(packed), reference_unpack(packed))


@needs_kernel
@given(matrices, st.integers(1, MOST_VECTORS))
def test_products_are_the_references_but_for_rounding(weight: torch.Tensor, vectors: int) -> None:
    packed = pack_rows(weight)
    inputs = torch.randn(vectors, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(weight.dtype)
    ours, reference = multiply(packed, inputs), reference_multiply(packed, inputs)
    assert ours.dtype == weight.dtype
    magnitude = inputs.double().abs() @ weight.double().abs().T  # what rounding errors are relative to
    limit = magnitude * (1e-5 if weight.dtype == torch.float32 else 1e-2)
    off = (ours.double() - reference.double()).abs() - limit
    assert off.max() <= 0, f"off by {float(off.max())} more than rounding"


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_sum_for_any_number_of_threads(dtype: torch.dtype, one_thread: None) -> None:
    packed = pack_rows(sparse_matrix(67, 515, rate=0.7, dtype=dtype, seed=0))
    inputs = torch.randn(3, 515, generator=torch.Generator().manual_seed(1)).to(dtype)
    alone = multiply(packed, inputs)
    torch.set_num_threads(3)
    assert torch.equal(multiply(packed, inputs), alone)


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="float16"):
        pack_rows(torch.zeros(2, 2, dtype=torch.float16))


def test_without_a_compiler_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(build.KernelUnavailable, match=r"install gcc or set CC|x86-64"):
        build.library.__wrapped__()
    with pytest.raises(build.KernelUnavailable, match="install gcc or set CC"):
        build.passes.__wrapped__()


@pytest.mark.parametrize("laid_out", ["transposed", "expanded", "every other"])
def test_a_weight_of_any_strides_is_packed(laid_out: str) -> None:
    whole = sparse_matrix(40, 140, rate=0.7, dtype=torch.float32, seed=0)
    weight = {
        "transposed": whole.t().contiguous().t(),
        "expanded": whole[:1].expand(40, 140),
        "every other": whole[::2, ::2],
    }[laid_out]
    assert not weight.is_contiguous()
    packed = pack_rows(weight)
    assert torch.equal(reference_unpack(packed), weight)
    if REASON is None:
        assert torch.equal(unpack(packed), weight)
