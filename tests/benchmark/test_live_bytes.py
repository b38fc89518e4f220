"""Are the bytes of tensors counted by storage, while they live, and is the planner's formula above what is counted?"""

from pathlib import Path

import pytest
import torch

from neuronal_ray.benchmark.live_bytes import LiveBytes
from neuronal_ray.benchmark.memory import AIMS_GIB, measure_lived, planned_streaming
from neuronal_ray.benchmark.timed import Setting
from neuronal_ray.models.synthetic import write_random_llama
from neuronal_ray.workers.footprint import GIB

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_storage_counts_once_and_while_it_lives() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        one = torch.zeros(1000)
        assert (live.live, live.peak) == (4000, 4000)
        view = one.view(10, 100)
        one.add_(1)
        assert live.live == 4000, "a view and a change in place have no storage of their own"
        before.mul_(2)
        assert live.live == 4000, "what was there before does not count"
        double = one.double()
        assert live.live == 12000
        del one
        assert live.live == 12000, "the view keeps it"
        del view
        assert (live.live, live.peak) == (8000, 12000)
    del double
    assert (live.live, live.peak) == (0, 12000)


def test_the_formula_is_above_what_lives_and_not_far(tmp_path: Path) -> None:
    """A text of 512 tokens is a quarter of a chunk, which the formula has whole: hence the factor of three."""
    config = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    write_random_llama(tmp_path / "model", config | {"num_attention_heads": 4}, dtype=torch.bfloat16)
    setting = Setting(
        name="small",
        path=tmp_path / "model",
        device="cpu",
        dtype="bfloat16",
        samples=2,
        length=256,
        calibration_samples=2,
        threads=1,
        offload=True,
    )
    found = measure_lived(setting)
    assert found.measured < found.formula < 3 * found.measured, found


@pytest.mark.parametrize("name", AIMS_GIB)
def test_the_terms_are_the_formula_and_within_the_aim(name: str) -> None:
    found = planned_streaming(name)
    assert all(size > 0 for size in found.terms.values()), found
    assert found.total <= found.aim, f"{found.total / GIB:.2f} GiB"
