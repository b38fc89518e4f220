"""The whole search against the independent slow oracle: given a tiny model, both choose the same lambdas and masks."""

from pathlib import Path

import oracle
import pytest
import torch
from oracle import OracleResult
from tiny import cpu_spec
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from neuronal_ray.algorithms.allocations import neuronal, uniform
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.progress import Progress
from neuronal_ray.core.problem import Problem, Step
from neuronal_ray.prune.search import Search
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.spec import Walk
from neuronal_ray.workers.tasks.final_model import mask, settle
from neuronal_ray.workers.tasks.statistics import keep_statistics, observe, rank

BLOCK_LAMBDAS, ROW_LAMBDAS = (0.02, 0.1, 0.25), (0.0, 0.05, 0.25)
SAMPLES, SEARCH_SAMPLES, LENGTH = 6, 3, 12
COMMON = {"vocab_size": 64, "max_position_embeddings": 64, "hidden_size": 16, "num_hidden_layers": 3}
FAMILIES = {
    "llama": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-grouped": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2},
    "mistral": {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 5},
    "opt": {"ffn_dim": 24, "num_attention_heads": 4, "word_embed_proj_dim": 16},
    "phi": {"intermediate_size": 24, "num_attention_heads": 4},
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the family, its weights wide enough for the choice of lambda to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        request.param.partition("-")[0], **COMMON, **FAMILIES[request.param], bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def model(saved: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()


def calibration() -> torch.Tensor:
    return torch.randint(3, 64, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(1))


def fast(saved: Path, *, mode: str, method: str, steps: str | None, stream: str, target: float) -> OracleResult:
    """What the package finds for the same question, in the oracle's terms; no steps: uniform."""
    spec = cpu_spec(saved, LinearPruner(method=method))
    pool = InProcessPool(spec)
    worker = pool.first(lambda worker: worker)
    text, progress = calibration(), Progress()
    if mode == "paper":
        keep_statistics(worker, observe(worker, text))
        rank(worker)
    search = Search(
        pool, layout=worker.layout, calibration=text, samples=SEARCH_SAMPLES, mode=mode, solves=False, progress=progress
    )
    problem = Problem(layout=worker.layout, target=target, mode=mode, probe=search)
    if steps is None:
        found = uniform.allocate(problem)
    else:
        found = neuronal.allocate(problem, steps=steps, block_lambdas=BLOCK_LAMBDAS, row_lambdas=ROW_LAMBDAS)
    if stream == "pruned":
        settle(worker, found.plan, text, Walk(pruned=True, released=mode == "authors"))
    searched = {step.name: step for step in found.steps}
    return OracleResult(
        block_scores=scores(searched.get("block")),
        row_scores=scores(searched.get("row")),
        lambda_block=searched["block"].selected if "block" in searched else None,
        lambda_row=searched["row"].selected if "row" in searched else None,
        masks={(spec.linear.block, spec.linear.path): mask(worker, spec.linear, found.plan) for spec in worker.layout},
    )


def scores(step: Step | None) -> dict[float, float]:
    return {} if step is None else dict(zip(step.lambdas, step.scores, strict=True))


def assert_same(found: OracleResult, expected: OracleResult) -> None:
    assert (found.lambda_block, found.lambda_row) == (expected.lambda_block, expected.lambda_row)
    assert found.block_scores == pytest.approx(expected.block_scores, rel=1e-5)
    assert found.row_scores == pytest.approx(expected.row_scores, rel=1e-5)
    assert set(found.masks) == set(expected.masks)
    different = {key: int((mask != expected.masks[key]).sum()) for key, mask in found.masks.items()}
    assert not any(different.values()), different


@pytest.mark.parametrize("method", ["magnitude", "wanda", "multiflow"])
@pytest.mark.parametrize(("mode", "stream"), [("paper", "dense"), ("paper", "pruned"), ("authors", "pruned")])
@pytest.mark.parametrize("target", [0.6, 0.83])
def test_the_whole_search_agrees(
    saved: Path, model: PreTrainedModel, method: str, mode: str, stream: str, target: float
) -> None:
    expected = oracle.neuronal(
        model,
        calibration(),
        search_samples=SEARCH_SAMPLES,
        mode=mode,
        method=method,
        sparsity=target,
        steps="both",
        block_lambdas=BLOCK_LAMBDAS,
        row_lambdas=ROW_LAMBDAS,
        score_stream=stream,
    )
    assert_same(fast(saved, mode=mode, method=method, steps="both", stream=stream, target=target), expected)


@pytest.mark.parametrize("steps", ["block", "row"])
@pytest.mark.parametrize(("mode", "stream"), [("paper", "dense"), ("authors", "pruned")])
def test_one_step_alone_agrees(saved: Path, model: PreTrainedModel, steps: str, mode: str, stream: str) -> None:
    expected = oracle.neuronal(
        model,
        calibration(),
        search_samples=SEARCH_SAMPLES,
        mode=mode,
        method="wanda",
        sparsity=0.7,
        steps=steps,
        block_lambdas=BLOCK_LAMBDAS,
        row_lambdas=ROW_LAMBDAS,
        score_stream=stream,
    )
    assert_same(fast(saved, mode=mode, method="wanda", steps=steps, stream=stream, target=0.7), expected)


@pytest.mark.parametrize(("mode", "stream"), [("paper", "dense"), ("paper", "pruned"), ("authors", "pruned")])
def test_uniform_agrees(saved: Path, model: PreTrainedModel, mode: str, stream: str) -> None:
    expected = oracle.uniform(model, calibration(), mode=mode, method="wanda", sparsity=0.7, score_stream=stream)
    assert_same(fast(saved, mode=mode, method="wanda", steps=None, stream=stream, target=0.7), expected)
