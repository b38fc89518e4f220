"""On a GPU: the same results as on a CPU, the same bits where blocks visit, and no more memory than was planned?

Run by jobs/gpu.sh on machines that have one, without beartype, ray, datasets and lm-eval: import none of them here.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import prune_arguments, write_model, write_texts
from torch import Tensor

import neuronal_ray.prune.__main__
from neuronal_ray.benchmark.device import device_peak, forget_peak, measure_ceilings
from neuronal_ray.benchmark.search import measure_search
from neuronal_ray.benchmark.timed import Setting, forwards_alone, random_tokens, timed_search, worker_of
from neuronal_ray.core.plan import Plan, exact_plan, uniform_rates
from neuronal_ray.evaluate.perplexity import window_losses
from neuronal_ray.models.checkpoint import empty_model
from neuronal_ray.models.output_files import plan_output_files
from neuronal_ray.models.synthetic import write_random_llama
from neuronal_ray.workers.footprint import Footprint, Work
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.tasks.candidates import set_search_text, trial
from neuronal_ray.workers.tasks.model_files import write, write_ahead, written
from neuronal_ray.workers.tasks.statistics import keep_statistics, observe, rank
from neuronal_ray.workers.worker import Worker

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DEVICE = "cuda"
CONFIG = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gpu") / "model"
    write_random_llama(path, CONFIG, dtype=torch.bfloat16)
    return path


def setting(model: Path, **changes: object) -> Setting:
    values: dict = {
        "name": "small",
        "path": model,
        "device": DEVICE,
        "dtype": "bfloat16",
        "samples": 4,
        "length": 1024,
        "calibration_samples": 4,
    }
    return Setting(**(values | changes))


def ranked(own: Setting) -> tuple[Worker, Tensor, Plan]:
    """A worker with its rankings, the text, and the uniform plan at 70 %."""
    pool = InProcessPool(own.spec)
    worker = worker_of(pool)
    tokens = random_tokens(own, worker)
    pool.each(keep_statistics, observe(worker, tokens))
    rank(worker)
    return worker, tokens, exact_plan(worker.layout, uniform_rates(worker.layout, lambda _: 0.7), target=0.7)


def uniform_misalignment(own: Setting) -> float:
    worker, tokens, plan = ranked(own)
    set_search_text(worker, tokens, chunk=2, with_reference=True)
    return trial(worker, plan).misalignment


def test_alignment_is_that_of_a_cpu(model: Path) -> None:
    found = [
        uniform_misalignment(setting(model, device=device, dtype="float32", samples=2, length=256))
        for device in (DEVICE, "cpu")
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fused_block_is_the_block(model: Path, dtype: str) -> None:
    """But for a rounding here and there: the normalization adds in another order, the gate has another exponential."""
    worker = worker_of(InProcessPool(setting(model, dtype=dtype).spec))
    stream = worker.replica.stream
    recording = stream.start(random_tokens(setting(model), worker)[:1].to(DEVICE))
    found = stream.block(1, recording).hidden.float()
    patched = [module for module in stream.blocks[1].modules() if "forward" in vars(module)]
    assert len(patched) == 4  # the attention, two normalizations, the activation
    for module in patched:
        del module.forward
    expected = stream.block(1, recording).hidden.float()
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    assert float((found - expected).norm() / expected.norm()) < tolerance / 10


def test_a_search_repeats_bit_for_bit_also_where_blocks_visit(model: Path) -> None:
    digests = []
    for offload in (False, False, True):
        own = setting(model, offload=offload)
        pool = InProcessPool(own.spec)
        run = timed_search(own, pool, random_tokens(own, worker_of(pool)))
        assert (run.asked, run.distinct) == (29, 28)
        digests.append([plan.digest for plan in run.plans])
    assert digests[0] == digests[1] == digests[2]


def test_files_and_logits_are_the_same_where_blocks_visit(model: Path, tmp_path: Path) -> None:
    found = []
    for offload in (False, True):
        own, target = setting(model, offload=offload), tmp_path / str(offload)
        target.mkdir()
        worker, tokens, plan = ranked(own)
        parts = plan_output_files(worker.replica.checkpoint, worker.layout, [worker.blocks])
        for part in parts:
            write_ahead(worker, part, plan, target)
        losses = window_losses(worker, tokens, plan)
        ahead = written(worker, 600.0)
        assert set(ahead) == (set() if offload else {part.file for part in parts})
        zeros = sum(ahead.get(part.file) or write(worker, part, plan, target) for part in parts)
        assert zeros == round(0.7 * worker.layout.prunable)
        found.append((losses.tolist(), [(target / part.file).read_bytes() for part in parts]))
    assert found[0] == found[1]


@pytest.mark.parametrize("offload", [False, True])
def test_memory_stays_within_what_was_planned(model: Path, offload: bool) -> None:
    own = setting(model, offload=offload)
    torch.cuda.empty_cache()
    device = torch.device(DEVICE)
    before = torch.cuda.memory_allocated(device)
    forget_peak(device)
    pool = InProcessPool(own.spec)
    worker = worker_of(pool)
    timed_search(own, pool, random_tokens(own, worker))
    peak = device_peak(device)
    assert peak is not None
    footprint = Footprint.of(empty_model(worker.replica.checkpoint), Work(item=2, held=own.samples * own.length))
    planned = footprint.offloaded() if offload else footprint.worker(1)
    assert peak - before <= planned, f"{(peak - before) / 2**20:.1f} MiB of {planned / 2**20:.1f} MiB planned"


def test_a_model_is_pruned_exactly_and_nearly_as_on_a_cpu(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    masks, perplexities = [], []
    for device in (DEVICE, "cpu"):
        out = tmp_path / device
        words = prune_arguments(tmp_path, out, device=device, dtype="float32", block_lambdas="0.1", row_lambdas="0.1")
        assert neuronal_ray.prune.__main__.main(words) == 0
        summary = json.loads((out / "pruning.json").read_text())
        prunable, pruned = summary["sparsity"]["prunable"], summary["sparsity"]["pruned"]
        assert pruned == round(0.6 * prunable)
        tensors = load_file(out / "model.safetensors")
        masks.append({name: tensor == 0 for name, tensor in tensors.items() if name.endswith("proj.weight")})
        perplexities.append(summary["evaluation"]["evaluation"]["perplexity"])
    same = sum(int((masks[0][name] == masks[1][name]).sum()) for name in masks[0])
    total = sum(mask.numel() for mask in masks[0].values())
    assert same / total > 0.99, f"{same / total:.4f} of the masks"
    assert perplexities[0] == pytest.approx(perplexities[1], rel=0.02)


def test_the_benchmark_measures(model: Path) -> None:
    found = measure_search(setting(model), repeats=2, literal_candidates=2)
    assert found.candidates == 28
    assert sum(stage.seconds for stage in found.stages) == pytest.approx(found.staged_s)
    assert {"masks", "ranking", "sparse forwards", "statistics, candidates"} <= {stage.name for stage in found.stages}
    assert found.device_bytes is not None
    assert 0 < found.device_bytes < 2**33
    assert found.literal is not None
    assert found.literal.ratio > 0
    assert found.lines()


def test_the_ceilings_are_a_gpus() -> None:
    found = measure_ceilings(torch.device(DEVICE), torch.bfloat16)
    assert found.flops > 1e12, str(found)
    assert found.bandwidth > 1e11, str(found)


def test_the_floor_waits_for_the_device(model: Path) -> None:
    """Twice the text takes longer: a time that does not wait would not tell."""
    times = []
    for samples in (2, 32):
        own = setting(model, samples=samples, calibration_samples=samples)
        worker, tokens, plan = ranked(own)
        times.append(forwards_alone(worker, tokens, plan, repeats=5))
    assert times[1] > 2 * times[0], times
