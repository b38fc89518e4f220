"""A packed matrix is restored bit for bit and takes the stated number of bytes."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.core import packing
from neuronal_ray.core.packing import pack, pack_words, unpack_words


def sparse(rows: int, columns: int, *, rate: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    return weight.masked_fill(torch.rand(rows, columns, generator=generator) < rate, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), rate=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_unpacking_gives_the_matrix_back(dtype: torch.dtype, rows: int, columns: int, rate: float) -> None:
    weight = sparse(rows, columns, rate=rate, dtype=dtype, seed=rows * columns)
    found = pack(weight).unpack()
    assert found.dtype == dtype
    assert torch.equal(found, weight)


@pytest.mark.parametrize(
    ("dtype", "integers"), [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)]
)
def test_every_bit_comes_back(dtype: torch.dtype, integers: torch.dtype) -> None:
    smallest = torch.tensor(1, dtype=integers).view(dtype).item()  # subnormal
    weight = torch.tensor([[math.nan, -math.inf, -0.0], [smallest, -smallest, 0.0], [-0.0, 1.0, -3.0]], dtype=dtype)
    packed = pack(weight)
    assert torch.equal(packed.unpack().view(integers), weight.view(integers))
    assert len(packed.values) == 8, "a negative zero is a value"


@given(shape=st.lists(st.integers(0, 9), max_size=4), kept=st.floats(0, 1), word=st.sampled_from([2, 4, 8]))
def test_words_of_any_shape_and_size_come_back(shape: list[int], kept: float, word: int) -> None:
    source = np.random.default_rng(math.prod(shape))
    words = source.integers(1, 2 ** (8 * word), math.prod(shape), dtype=f"u{word}")
    words[source.random(len(words)) >= kept] = 0
    bits, values = pack_words(words)
    assert (len(bits), len(values)) == (-(-len(words) // 8), np.count_nonzero(words))
    assert np.bitwise_count(bits).sum() == len(values)
    assert np.array_equal(unpack_words(bits, values, len(words)), words)
    tensor = torch.from_numpy(words.view(f"i{word}")).view(
        {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[word]
    )
    found = pack(tensor.view(shape)).unpack()
    assert list(found.shape) == shape
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[word]
    assert np.array_equal(found.flatten().view(integers).numpy().view(words.dtype), words)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 47, 48, 49])
def test_slices_join_without_a_seam(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    words = np.arange(size, dtype=np.uint16) % 3
    expected = pack_words(words)
    monkeypatch.setattr(packing, "_SLICE", 16)
    found = pack_words(words)
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert np.array_equal(unpack_words(*found, size), words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_devices_pack_to_the_same_bits(dtype: torch.dtype) -> None:
    weight = sparse(7, 11, rate=0.6, dtype=dtype)
    weight[2, 3] = -0.0
    on_cpu = pack(weight)
    bits, values = packing._pack_in_torch(weight.flatten())
    assert torch.equal(bits, on_cpu.bits)
    assert torch.equal(values, on_cpu.values)
    found = packing._unpack_in_torch(bits, values, weight.numel()).view(weight.shape)
    assert torch.equal(found.view(torch.uint8), weight.view(torch.uint8))


def test_the_bits_are_those_of_the_weights_in_order() -> None:
    weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    packed = pack(weight)
    expected = [0, 0]
    for place, value in enumerate(weight.flatten().tolist()):
        expected[place // 8] |= (value != 0) << (place % 8)
    assert packed.bits.tolist() == expected
    assert packed.values.tolist() == [2.0, 1.0, 3.0, 4.0]


def test_a_transposed_view_is_packed_as_it_is_seen() -> None:
    weight = sparse(6, 10, rate=0.5, dtype=torch.float32).t()
    assert torch.equal(pack(weight).unpack(), weight)


def test_it_holds_a_bit_per_weight_and_the_values() -> None:
    weight = sparse(64, 64, rate=0.7, dtype=torch.bfloat16)
    assert pack(weight).nbytes == 64 * 64 // 8 + 2 * int((weight != 0).sum())
