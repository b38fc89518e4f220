"""Is the divergence that of the models' own logits, without ever holding all of them?"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from neuronal_ray.models.blocks import Recording, Stream
from neuronal_ray.workers.distributions import Distributions
from neuronal_ray.workers.replica import Replica

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "opt", "phi", "gpt2", "gemma2", "mixtral"]
TEXT = torch.randint(3, 64, (3, 13), generator=torch.Generator().manual_seed(0))


def halves(replica: Replica) -> tuple[list[Recording], list[Recording]]:
    """The text after the last block: dense, and with every second column of the last block's linears zeroed."""
    _, dense = replica.start(TEXT, chunk=2)
    sparse = dense
    last = replica.layout.num_blocks - 1
    for index in range(last):
        dense, _ = replica.run(index, dense)
        sparse = dense
    weights = {}
    for spec in replica.layout.blocks[last]:
        weights[spec.linear] = replica.weight(spec).clone()
        weights[spec.linear][:, ::2] = 0
    sparse, _ = replica.run_with(last, dense, weights)
    dense, _ = replica.run(last, dense)
    return dense, sparse


@pytest.fixture(scope="module")
def replica(checkpoint_dir: Callable[[str], Path]) -> Callable[[str], Replica]:
    def load(name: str) -> Replica:
        return Replica.load(checkpoint_dir(name), device="cpu", dtype="float32", trust_remote_code=False)

    return load


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_that_of_transformers_logits(
    family: str, replica: Callable[[str], Replica], checkpoint_dir: Callable[[str], Path]
) -> None:
    ours = replica(family)
    dense, sparse = halves(ours)
    found = Distributions(list(TEXT.split(2)), dense).divergence(sparse, ours.stream)
    model = AutoModelForCausalLM.from_pretrained(checkpoint_dir(family), dtype=torch.float32).eval()
    with torch.no_grad():
        p = model(TEXT, use_cache=False).logits.double().log_softmax(-1)
        q = torch.cat([ours.stream.finish(text, end) for text, end in zip(TEXT.split(2), sparse, strict=True)]).double()
    expected = (p.exp() * (p - q.log_softmax(-1))).sum(-1).mean(-1)
    assert found == pytest.approx(expected.tolist(), rel=1e-4)
    assert min(found) > 1e-3, "the two models differ"


def test_sizes_of_slices_and_cache_do_not_matter(replica: Callable[[str], Replica]) -> None:
    ours = replica("llama")
    dense, sparse = halves(ours)
    found = {}
    for size in (1, 64 * 5, 10**6):
        for cache in (0, 64 * 20, 10**6):
            distributions = Distributions(list(TEXT.split(2)), dense, slice_size=size, cache_size=cache)
            first = distributions.divergence(sparse, ours.stream)
            assert distributions.divergence(sparse, ours.stream) == first, (
                "kept log-probabilities are those computed anew"
            )
            found[size, cache] = first
    for size in (1, 64 * 5, 10**6):
        assert found[size, 0] == found[size, 64 * 20] == found[size, 10**6]
        assert found[size, 0] == pytest.approx(found[10**6, 0], rel=1e-5)  # other shapes of the head's product


def test_no_more_logits_than_a_slice_exist(replica: Callable[[str], Replica], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = replica("llama")
    dense, sparse = halves(ours)
    made: list[int] = []
    finish = Stream.finish

    def counted(self: Stream, tokens: Tensor, recording: Recording) -> Tensor:
        logits = finish(self, tokens, recording)
        made.append(logits.numel())
        return logits

    monkeypatch.setattr(Stream, "finish", counted)
    size = 4 * ours.stream.vocabulary
    Distributions(list(TEXT.split(2)), dense, slice_size=size).divergence(sparse, ours.stream)
    assert max(made) == size
    assert sum(made) == 2 * TEXT.numel() * ours.stream.vocabulary


def test_overflow_is_infinite(replica: Callable[[str], Replica]) -> None:
    ours = replica("llama")
    dense, sparse = halves(ours)
    sparse[0].hidden[1] = math.nan
    found = Distributions(list(TEXT.split(2)), dense).divergence(sparse, ours.stream)
    assert [math.isfinite(value) for value in found] == [True, False, True]
