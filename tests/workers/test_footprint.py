"""Does the planner take as few shards as fit, as many replicas as there is room for, and say when nothing fits?"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronal_ray.benchmark.scaling import Costs, predicted
from neuronal_ray.benchmark.shapes import SHAPES
from neuronal_ray.models.synthetic import empty_llama
from neuronal_ray.workers.footprint import GIB, Devices, Footprint, Work, fit, needed_devices

TINY = Footprint(weights=(10, 10, 10, 10), ranks=(10, 10, 10, 10), outside=4, passing=6)


def devices(count: int, memory: int) -> Devices:
    return Devices(kind="GPU", memory=(memory,) * count)


def test_a_worker_holds_its_blocks_and_what_is_outside_and_passes_through() -> None:
    assert [TINY.worker(shards) for shards in (1, 2, 3, 4)] == [90, 50, 50, 30]


def test_replicas_come_before_shards() -> None:
    for memory, shards, replicas in ((100, 1, 4), (60, 2, 2), (40, 4, 1)):
        found = fit(TINY, devices(4, memory))
        assert (found.shards, found.replicas) == (shards, replicas)


def test_the_smallest_device_sets_the_measure() -> None:
    mixed = Devices(kind="GPU", memory=(1000, 60, 1000))
    assert (fit(TINY, mixed).shards, fit(TINY, mixed).replicas) == (2, 1)


def test_what_is_asked_for_is_kept_or_refused() -> None:
    found = fit(TINY, devices(2, 1000), shards=1, replicas=4)
    assert (found.replicas, found.device_bytes) == (4, 460), "two workers share a device"
    assert fit(TINY, devices(8, 1000), shards=4).replicas == 2
    with pytest.raises(ValueError, match="--shards: 5 shards of a model of 4 blocks"):
        fit(TINY, devices(8, 1000), shards=5)
    with pytest.raises(ValueError, match=r"--shards: in 1 shard a worker needs .* add devices"):
        fit(TINY, devices(8, 40), shards=1)
    with pytest.raises(ValueError, match=r"--shards: in 2 shards a worker needs"):
        fit(TINY, devices(2, 40))
    with pytest.raises(ValueError, match=r"--shards: in 1 shard a worker needs"):
        fit(TINY, devices(2, 80), replicas=4)


def test_blocks_are_offloaded_where_all_gpus_together_cannot_hold_the_model() -> None:
    assert TINY.offloaded() == 2 * 10 + 10 + 4 + 6
    found = fit(TINY, devices(2, 45))
    assert (found.shards, found.replicas, found.worker_bytes, found.offload) == (2, 1, 40, True)
    assert fit(TINY, devices(1, 60), shards=1).offload
    assert not fit(TINY, devices(2, 60)).offload
    with pytest.raises(ValueError, match="--shards: in 1 shard a worker needs"):
        fit(TINY, Devices(kind="node", memory=(60,)))


@given(st.integers(1, 16), st.integers(20, 200))
def test_what_is_chosen_fits_and_fewer_shards_would_not(count: int, memory: int) -> None:
    try:
        found = fit(TINY, devices(count, memory))
    except ValueError:
        assert all(TINY.worker(shards) > 0.92 * memory for shards in range(1, min(count, 4) + 1))
        return
    if found.offload:
        assert all(TINY.worker(shards) > 0.92 * memory - 1 for shards in range(1, min(count, 4) + 1))
        assert TINY.offloaded() <= 0.92 * memory
        return
    assert TINY.worker(found.shards) == found.worker_bytes <= found.device_bytes <= memory
    assert found.replicas * found.shards <= count
    assert found.shards == 1 or TINY.worker(found.shards - 1) > int(0.92 * memory)
    assert needed_devices(TINY, memory) == found.shards


def test_the_footprint_of_a_llama_is_that_of_its_shapes() -> None:
    shape = SHAPES["7b"].config
    found = Footprint.of(empty_llama(**shape), Work(item=2, held=0))
    hidden, wide = shape["hidden_size"], shape["intermediate_size"]
    linears = 4 * hidden**2 + 3 * hidden * wide
    assert found.weights == (2 * (linears + 2 * hidden),) * 32
    assert found.ranks == (2 * linears,) * 32
    assert found.outside == 2 * (2 * 32000 * hidden + hidden)
    assert Footprint.of(empty_llama(**shape), Work(item=2, held=0, ranks=False)).ranks == (0,) * 32
    assert 24 * GIB < found.worker(1) < 32 * GIB


def test_predictions_are_the_models_own_arithmetic() -> None:
    """The 7B search on one device: 28 candidates, nothing handed on, by hand."""
    footprint = Footprint.of(empty_llama(**SHAPES["7b"].config), Work(item=2, held=0))
    costs = Costs(call_s=0.0, handed_rate=1e9, over_arithmetic=1.0)
    one = predicted("7b", footprint, 1, 1, costs)
    weights = sum(footprint.weights) / 2
    turn = 2 * weights * 16384 / 200e12 + (3 * 2 * weights + sum(footprint.ranks)) / 2e12
    assert one.seconds == pytest.approx(28 * turn)
    assert one.bottleneck == "arithmetic"
    assert predicted("7b", footprint, 64, 1, costs).seconds == pytest.approx(2 * turn)
    assert predicted("7b", footprint, 64, 1, costs).bottleneck == "idle devices"
    slow = Costs(call_s=0.0, handed_rate=1e6, over_arithmetic=1.0)
    assert predicted("7b", footprint, 2, 2, slow).bottleneck == "hidden states"


def test_lanes_count_where_a_model_is_whole_on_a_cpu() -> None:
    shape = SHAPES["wide"].config
    model = empty_llama(**shape)
    here, gpu = (Footprint.of(model, Work(item=4, held=4096, device=device)) for device in ("cpu", "cuda"))
    copy, text = max(here.weights), 4096 * shape["hidden_size"] * 4
    assert here.parallel >= 7 * (copy + 2 * text)
    assert here.worker(1) - here.parallel == sum(here.weights) + sum(here.ranks) + here.outside + here.passing
    assert here.worker(2) < here.worker(1) - here.parallel
    assert gpu.parallel == 0
