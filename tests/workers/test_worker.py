"""Does a worker measure, try and write what it says, and is its model as dense after it as before?"""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import cpu_spec, write_pruned
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import neuronal_ray.workers.replica
from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.algorithms.methods import sparsegpt
from neuronal_ray.core.layout import Group, Linear, LinearSpec
from neuronal_ray.core.plan import Plan, exact_plan, uniform_rates
from neuronal_ray.core.stats import SquareSum
from neuronal_ray.models.blocks import Recording, set_weight, weight_of
from neuronal_ray.models.checkpoint import open_checkpoint
from neuronal_ray.workers.replica import chunk_sequences
from neuronal_ray.workers.spec import Walk, WorkerSpec
from neuronal_ray.workers.tasks.candidates import divergences, local_trial, set_search_text, trial
from neuronal_ray.workers.tasks.final_model import logits, mask, settle
from neuronal_ray.workers.tasks.probes import changed, differences, set_excerpt
from neuronal_ray.workers.tasks.statistics import describe, device_name, keep_statistics, observe, rank
from neuronal_ray.workers.worker import Worker

pytestmark = pytest.mark.usefixtures("one_thread")

CheckpointDir = Callable[[str], Path]

SEQUENCES, LENGTH = 3, 12
TARGET = 0.7


def text(sequences: int = SEQUENCES, *, seed: int = 0) -> torch.Tensor:
    """[sequences, LENGTH] tokens."""
    return torch.randint(3, 64, (sequences, LENGTH), generator=torch.Generator().manual_seed(seed))


def spec_of(path: Path, *, dtype: str = "float32", method: str = "wanda") -> WorkerSpec:
    return cpu_spec(path, LinearPruner(method=method), dtype=dtype, threads=None)


def ready(path: Path, *, dtype: str = "float32", method: str = "wanda") -> Worker:
    """A worker that has ranked and knows its search text."""
    worker = Worker.build(spec_of(path, dtype=dtype, method=method))
    keep_statistics(worker, observe(worker, text()))
    rank(worker)
    set_search_text(worker, text(seed=1), chunk=SEQUENCES, with_reference=True)
    return worker


@pytest.fixture(scope="module")
def worker(family: str, checkpoint_dir: CheckpointDir) -> Worker:
    """Shared by the tests below, which leave it as it is: its weights dense, its ranking that of the dense stream."""
    return ready(checkpoint_dir(family))


def plan_at(worker: Worker, target: float) -> Plan:
    """Rates that differ from block to block, the exact total."""
    rates = uniform_rates(worker.layout, lambda block: target + 0.1 * (block - 1))
    return exact_plan(worker.layout, rates, target=target)


def module_of(model: nn.Module, worker: Worker, spec: LinearSpec) -> nn.Module:
    return model.get_submodule(f"{worker.replica.stream.blocks_name}.{spec.linear.block}.{spec.linear.path}")


@contextmanager
def unchanged(worker: Worker) -> Iterator[None]:
    """Fails unless weights (bits and memory), hooks and forwards are after the body what they were before."""
    model = worker.replica.stream.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in model.state_dict().items()}
    yield
    after = model.state_dict()
    changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert not changed, f"weights changed: {changed}"
    assert {name: (tensor.data_ptr(), tensor.stride()) for name, tensor in after.items()} == places
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert "forward" not in vars(module), name


def own_norms(model: PreTrainedModel, worker: Worker, tokens: torch.Tensor) -> dict[Group, torch.Tensor]:
    """a_j of every group's input, by hooks on the whole model's own forward; asserts that a group reads one tensor."""
    seen: dict[Group, list[torch.Tensor]] = {}
    handles = []
    for spec in worker.layout:

        def note(_: nn.Module, args: tuple[torch.Tensor, ...], group: Group = spec.reads) -> None:
            seen.setdefault(group, []).append(args[0].double())

        handles.append(module_of(model, worker, spec).register_forward_pre_hook(note))
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    norms = {}
    for group, inputs in seen.items():
        assert all(torch.equal(inputs[0], other) for other in inputs), group
        flat = inputs[0].reshape(-1, inputs[0].shape[-1])  # OPT joins sequences and tokens
        norms[group] = (flat.square().sum(dim=0) / len(tokens)).sqrt()
    return norms


def literal_misalignment(
    worker: Worker, dense: Mapping[Group, torch.Tensor], sparse: Mapping[Group, torch.Tensor]
) -> float:
    """Equation 2, a term for each linear."""
    total = 0.0
    for spec in worker.layout:
        one, other = dense[spec.reads], sparse[spec.reads]
        total += float((one / one.sum() - other / other.sum()).norm()) / spec.columns
    return total


def wanda_pruned(worker: Worker, path: Path, norms: Mapping[Group, torch.Tensor], plan: Plan) -> PreTrainedModel:
    """The model with each row's lowest |W| * a set to zero, by a sort of its own."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for spec in worker.layout:
        module = module_of(model, worker, spec)
        weight = weight_of(module).clone()
        score = weight.abs() * norms[spec.reads].float()
        for row, count in enumerate(plan.removed[spec.linear].tolist()):
            weight[row, score[row].argsort(stable=True)[:count]] = 0
        set_weight(module, weight.contiguous())
    return model


# -- the dense stream


def test_statistics_are_those_of_the_models_own_run(worker: Worker) -> None:
    wanted = own_norms(worker.replica.stream.model, worker, text())
    with unchanged(worker):
        observed = observe(worker, text())
    assert set(observed) == set(wanted) == set(worker.layout.groups)
    for group, statistic in observed.items():
        torch.testing.assert_close(statistic.norm.double(), wanted[group], rtol=1e-5, atol=1e-6, msg=str(group))


def test_a_statistic_is_taken_once_per_tensor_however_many_linears_read_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[torch.Size] = []
    of = SquareSum.of

    def counted(inputs: torch.Tensor) -> SquareSum:
        shapes.append(inputs.shape)
        return of(inputs)

    monkeypatch.setattr(SquareSum, "of", counted)
    observe(worker, text())
    assert len(shapes) == len(worker.layout.groups)
    assert {shape[:2] for shape in shapes} == {(SEQUENCES, LENGTH)}


def test_merged_chunks_rank_as_the_whole_text_does(worker: Worker) -> None:
    whole = observe(worker, text())
    merged = observe(worker, text()[:1])
    for part in text()[1:].split(1):
        merged = {group: merged[group].merge(statistic) for group, statistic in observe(worker, part).items()}
    for group, statistic in whole.items():
        torch.testing.assert_close(merged[group].norm, statistic.norm, rtol=1e-4, atol=1e-5, msg=str(group))


# -- trials


def test_a_plan_of_zeros_is_aligned_exactly(worker: Worker) -> None:
    plan = plan_at(worker, 0.0)
    assert plan.total == 0
    with unchanged(worker):
        found = trial(worker, plan)
    assert found.misalignment == 0
    assert set(found.signals) == set(worker.layout.groups)
    assert not any(signal.any() for signal in found.signals.values())


def test_a_trial_is_equation_2_of_a_model_pruned_by_hand(
    worker: Worker, family: str, checkpoint_dir: CheckpointDir
) -> None:
    plan = plan_at(worker, TARGET)
    ranking_norms = own_norms(worker.replica.stream.model, worker, text())
    pruned = wanda_pruned(worker, checkpoint_dir(family), ranking_norms, plan)
    dense = own_norms(worker.replica.stream.model, worker, text(seed=1))
    sparse = own_norms(pruned, worker, text(seed=1))
    with unchanged(worker):
        found = trial(worker, plan)
    assert found.misalignment > 0
    assert found.misalignment == pytest.approx(literal_misalignment(worker, dense, sparse), rel=1e-4)
    for group, signal in found.signals.items():
        torch.testing.assert_close(signal.double(), dense[group] - sparse[group], rtol=1e-3, atol=1e-4, msg=str(group))


def test_trials_do_not_influence_one_another(worker: Worker) -> None:
    one, other = plan_at(worker, TARGET), plan_at(worker, 0.4)
    first = trial(worker, one)
    trial(worker, other)
    again = trial(worker, one)
    assert first.misalignment == again.misalignment
    assert all(torch.equal(first.signals[group], again.signals[group]) for group in first.signals)


def test_a_plan_that_lacks_a_linear_fails_and_leaves_the_weights_alone(worker: Worker) -> None:
    plan = plan_at(worker, TARGET)
    lost = worker.layout.specs[-1].linear
    broken = Plan({linear: counts for linear, counts in plan.removed.items() if linear != lost})
    with unchanged(worker), pytest.raises(KeyError):
        trial(worker, broken)


def test_an_error_inside_a_pruned_block_leaves_the_weights_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = worker.layout.specs[-1]
    module = module_of(worker.replica.stream.model, worker, last)
    plan, block = plan_at(worker, TARGET), worker.replica.stream.block

    def failing(index: int, recording: Recording) -> Recording:
        if index == last.linear.block:
            assert not weight_of(module).all(), "not pruned at this moment"
            raise RuntimeError("out of memory")
        return block(index, recording)

    before = trial(worker, plan).misalignment
    with unchanged(worker), monkeypatch.context() as patch:
        patch.setattr(worker.replica.stream, "block", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            trial(worker, plan)
    assert trial(worker, plan).misalignment == before


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_sparse_model_that_overflows_is_infinitely_misaligned(
    checkpoint_dir: CheckpointDir, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    worker = ready(checkpoint_dir("llama"))
    block = worker.replica.stream.block

    def overflowing(index: int, recording: Recording) -> Recording:
        output = block(index, recording)
        return Recording(output.hidden * factor, output.calls)

    monkeypatch.setattr(worker.replica.stream, "block", overflowing)
    assert trial(worker, plan_at(worker, TARGET)).misalignment == math.inf


def test_the_released_codes_trial_leaves_the_weights_alone(family: str, checkpoint_dir: CheckpointDir) -> None:
    worker = Worker.build(spec_of(checkpoint_dir(family)))
    set_search_text(worker, text(), chunk=1, with_reference=False)
    with unchanged(worker):
        found = local_trial(worker, plan_at(worker, TARGET))
    assert 0 < found.misalignment < math.inf
    for block in range(worker.layout.num_blocks):
        assert not found.signals[Group(block, 0)].any(), "a block's first input is the same, pruned block or not"


# -- the result


def test_the_written_checkpoint_is_the_model_that_was_tried(
    worker: Worker, family: str, checkpoint_dir: CheckpointDir, tmp_path: Path
) -> None:
    plan = plan_at(worker, TARGET)
    wanted = round(TARGET * worker.layout.prunable)
    assert plan.total == wanted
    checkpoint = open_checkpoint(checkpoint_dir(family))
    with unchanged(worker):
        zeros = write_pruned(worker, plan, tmp_path)
    assert zeros == wanted, (zeros, wanted, worker.layout.prunable)

    saved, own = (load_file(path / "model.safetensors") for path in (tmp_path, checkpoint.path))
    differing = {name for name in own if not torch.equal(own[name], saved[name])}
    names = {
        checkpoint.stored_name(f"{worker.replica.stream.blocks_name}.{spec.linear.block}.{spec.linear.path}.weight")
        for spec in worker.layout
    }
    assert differing == names
    assert sum(int((saved[name] == 0).sum()) for name in names) == wanted
    assert sum(int((own[name] == 0).sum()) for name in names) == 0

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for spec in worker.layout:
        gone = weight_of(module_of(loaded, worker, spec)) == 0
        assert torch.equal(gone, mask(worker, spec.linear, plan)), spec.linear
        assert gone.sum(dim=1).tolist() == plan.removed[spec.linear].tolist(), spec.linear
    with torch.no_grad():
        reloaded = loaded(input_ids=text(), use_cache=False).logits
    (tried,) = logits(worker, text(), plan, lambda _, chunks: chunks)
    assert torch.equal(reloaded, tried), float((reloaded - tried).abs().max())


def test_dense_logits_are_the_models_own(worker: Worker) -> None:
    with unchanged(worker):
        (found,) = logits(worker, text(), None, lambda _, chunks: chunks)
    with torch.no_grad():
        wanted = worker.replica.stream.model(input_ids=text(), use_cache=False).logits
    assert torch.equal(found, wanted)
    (zeros,) = logits(worker, text(), plan_at(worker, 0.0), lambda _, chunks: chunks)
    assert torch.equal(zeros, wanted)


def test_logits_come_in_chunks_of_a_fixed_number_of_tokens(
    checkpoint_dir: CheckpointDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neuronal_ray.workers.replica, "CHUNK_TOKENS", {"cpu": 2 * LENGTH + 1})
    assert [chunk_sequences(length) for length in (1, LENGTH, LENGTH + 1, 10_000)] == [25, 2, 1, 1]
    worker = Worker.build(spec_of(checkpoint_dir("llama")))
    parts = list(logits(worker, text(5), None, lambda _, chunks: chunks))
    assert [len(part) for part in parts] == [2, 2, 1]
    for tokens, part in zip(text(5).split(2), parts, strict=True):
        with torch.no_grad():
            assert torch.equal(part, worker.replica.stream.model(input_ids=tokens, use_cache=False).logits)


# -- the pruned stream


def test_ranking_on_the_pruned_stream_reads_what_the_pruned_blocks_give(
    family: str, checkpoint_dir: CheckpointDir
) -> None:
    path = checkpoint_dir(family)
    worker = ready(path)
    plan = plan_at(worker, TARGET)
    on_dense = {spec.linear: mask(worker, spec.linear, plan) for spec in worker.layout}
    with unchanged(worker):
        settle(worker, plan, text(), Walk(pruned=True))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for specs in worker.layout.blocks:  # prune block after block, each by what its pruned predecessors give
        norms = own_norms(model, worker, text())
        for spec in specs:
            module = module_of(model, worker, spec)
            weight = weight_of(module).clone()
            score = weight.abs() * norms[spec.reads].float()
            for row, count in enumerate(plan.removed[spec.linear].tolist()):
                weight[row, score[row].argsort(stable=True)[:count]] = 0
            gone = mask(worker, spec.linear, plan)
            assert torch.equal(gone, weight == 0), (spec.linear, int((gone ^ (weight == 0)).sum()))
            set_weight(module, weight.contiguous())
    first, last = worker.layout.blocks[0], worker.layout.blocks[-1]
    assert all(torch.equal(mask(worker, spec.linear, plan), on_dense[spec.linear]) for spec in first)
    assert not all(torch.equal(mask(worker, spec.linear, plan), on_dense[spec.linear]) for spec in last)


# -- methods, types and bad models


def test_magnitude_ranks_without_text(checkpoint_dir: CheckpointDir) -> None:
    worker = Worker.build(spec_of(checkpoint_dir("llama"), method="magnitude"))
    rank(worker)
    plan = plan_at(worker, TARGET)
    for spec in worker.layout:
        weight = weight_of(module_of(worker.replica.stream.model, worker, spec)).abs()
        gone = mask(worker, spec.linear, plan)
        highest_gone = weight.masked_fill(~gone, 0).amax(dim=1)
        lowest_kept = weight.masked_fill(gone, math.inf).amin(dim=1)
        assert (highest_gone <= lowest_kept).all(), spec.linear


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon_new_decoder"])
def test_half_precision_is_tried_and_written(
    name: str, dtype: str, checkpoint_dir: CheckpointDir, tmp_path: Path
) -> None:
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[dtype]
    stored = tmp_path / "stored"
    AutoModelForCausalLM.from_pretrained(checkpoint_dir(name)).to(kind).save_pretrained(stored)
    worker = ready(stored, dtype=dtype)
    assert {parameter.dtype for parameter in worker.replica.stream.model.parameters()} == {kind}
    plan = plan_at(worker, TARGET)
    with unchanged(worker):
        found = trial(worker, plan)
        assert trial(worker, plan_at(worker, 0.0)).misalignment == 0
    assert 0 < found.misalignment < math.inf
    target = tmp_path / "pruned"
    target.mkdir()
    own_zeros = sum(
        int(
            (
                (weight_of(module_of(worker.replica.stream.model, worker, spec)) == 0)
                & ~mask(worker, spec.linear, plan)
            ).sum()
        )
        for spec in worker.layout
    )
    assert write_pruned(worker, plan, target) == plan.total + own_zeros
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=kind).eval()
    with torch.no_grad():
        reloaded = loaded(input_ids=text(), use_cache=False).logits
    (tried,) = logits(worker, text(), plan, lambda _, chunks: chunks)
    assert torch.equal(reloaded, tried)


@pytest.mark.parametrize("refinement", [None, "dsnot"])
def test_a_hessian_that_cannot_be_factorized_is_named(
    refinement: str | None, checkpoint_dir: CheckpointDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsegpt, "_inverse_factor", lambda *_: None)
    pruner = LinearPruner(method="sparsegpt", refinement=refinement)
    worker = Worker.build(dataclasses.replace(spec_of(checkpoint_dir("llama")), pruner=pruner))
    with (
        unchanged(worker),
        pytest.raises(ValueError, match=r"^--method sparsegpt: block 0 \S+: the Hessian .* no Cholesky"),
    ):
        settle(worker, plan_at(worker, TARGET), text(), Walk(pruned=True))


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_solved_weights_are_written(name: str, method: str, checkpoint_dir: CheckpointDir, tmp_path: Path) -> None:
    path = checkpoint_dir(name)
    worker = Worker.build(spec_of(path, method=method))
    plan = plan_at(worker, TARGET)
    with nullcontext() if name == "mixtral" else unchanged(worker):  # experts keep a forward that calls each one
        settle(worker, plan, text(), Walk(pruned=True))
        (tried,) = logits(worker, text(), plan, lambda _, chunks: chunks)
    target = tmp_path / "pruned"
    target.mkdir()
    assert write_pruned(worker, plan, target) == plan.total
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    with torch.no_grad():
        reloaded = loaded(input_ids=text(), use_cache=False).logits
    torch.testing.assert_close(reloaded, tried, rtol=1e-4, atol=1e-4)  # experts may run in another order
    dense = Worker.build(spec_of(path, method=method))
    moved = [
        not torch.equal(worker.kept.solved[spec.linear][kept], dense.replica.weight(spec)[kept])
        for spec in worker.layout
        for kept in [~mask(worker, spec.linear, plan)]
    ]
    assert all(moved), "weights that stay make up for those that went"


def test_automatic_means_float32_on_a_cpu(checkpoint_dir: CheckpointDir, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint_dir("llama")).to(torch.bfloat16).save_pretrained(tmp_path)
    worker = Worker.build(spec_of(tmp_path, dtype="auto"))
    assert {parameter.dtype for parameter in worker.replica.stream.model.parameters()} == {torch.float32}


def test_threads_are_set_where_asked(checkpoint_dir: CheckpointDir) -> None:
    worker = Worker.build(dataclasses.replace(spec_of(checkpoint_dir("llama")), threads=1))
    assert torch.get_num_threads() == 1
    assert device_name(worker) == "cpu, 1 threads"
    assert describe(worker) is worker.layout


def damaged(path: Path, target: Path, name: str, change: Callable[[torch.Tensor], None]) -> Path:
    """A copy of the checkpoint with one tensor changed."""
    shutil.copytree(path, target)
    tensors = load_file(path / "model.safetensors")
    change(tensors[name])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(checkpoint_dir: CheckpointDir, tmp_path: Path, value: float) -> None:
    def change(weight: torch.Tensor) -> None:
        weight[3, 5] = value

    path = damaged(checkpoint_dir("llama"), tmp_path / "model", "model.layers.1.mlp.up_proj.weight", change)
    with pytest.raises(ValueError, match=r"^--model: NaN or infinite weights in block 1 mlp\.up_proj$"):
        Worker.build(spec_of(path))


def test_activations_that_overflow_are_refused(checkpoint_dir: CheckpointDir, tmp_path: Path) -> None:
    path = damaged(
        checkpoint_dir("llama"),
        tmp_path / "model",
        "model.layers.1.mlp.up_proj.weight",
        lambda weight: weight.mul_(1e30),
    )
    worker = Worker.build(spec_of(path))
    message = r"^--model: NaN or infinite activations in block 1 of the dense model$"
    with unchanged(worker), pytest.raises(ValueError, match=message):
        observe(worker, text())
    with unchanged(worker), pytest.raises(ValueError, match=message):
        set_search_text(worker, text(), chunk=SEQUENCES, with_reference=True)


def test_a_missing_file_is_refused_before_anything_is_loaded(checkpoint_dir: CheckpointDir, tmp_path: Path) -> None:
    shutil.copytree(checkpoint_dir("llama"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"a": "lost.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"^--model: .*lost.safetensors is missing"):
        Worker.build(spec_of(tmp_path / "model"))


def test_the_base_models_checkpoint_is_written_under_its_own_names(
    checkpoint_dir: CheckpointDir, tmp_path: Path
) -> None:
    """GPT-2's published checkpoint has no prefix before its blocks."""
    base, target = tmp_path / "base", tmp_path / "pruned"
    AutoModelForCausalLM.from_pretrained(checkpoint_dir("gpt2")).base_model.save_pretrained(base)
    worker = ready(base)
    plan = plan_at(worker, TARGET)
    target.mkdir()
    assert write_pruned(worker, plan, target) == plan.total
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
        reloaded = loaded(input_ids=text(), use_cache=False).logits
    (tried,) = logits(worker, text(), plan, lambda _, chunks: chunks)
    assert torch.equal(reloaded, tried)


# --- divergence ---


def test_changes_are_those_of_the_changed_plan_on_those_sequences(checkpoint_dir: Callable[[str], Path]) -> None:
    spec = cpu_spec(checkpoint_dir("llama"), LinearPruner(method="magnitude"), threads=None)
    text = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(5))
    worker, excerpt = Worker.build(spec), Worker.build(spec)
    for each, tokens in ((worker, text), (excerpt, text[1:3])):
        rank(each)
        set_search_text(each, tokens, chunk=2, with_reference=True)
    set_excerpt(worker, range(1, 3))
    layout = worker.layout
    plan = exact_plan(layout, uniform_rates(layout, lambda _: 0.5), target=0.5)
    other = exact_plan(layout, uniform_rates(layout, lambda _: 0.8), target=0.8)
    blocks = [[], [0], [1], [layout.num_blocks - 1], [0, 2]]
    changes = [
        {spec.linear: other.removed[spec.linear] for b in chosen for spec in layout.blocks[b]} for chosen in blocks
    ]
    found = changed(worker, range(len(changes)), changes, plan, range(1, 3))
    for value, change in zip(found, changes, strict=True):
        (expected,) = divergences(excerpt, [Plan({**plan.removed, **change})])
        assert value == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert len(set(found)) == len(found)


def test_differences_are_those_of_two_models_side_by_side(checkpoint_dir: Callable[[str], Path]) -> None:
    spec = cpu_spec(checkpoint_dir("opt"), LinearPruner(method="magnitude"), threads=None)
    text = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(6))
    worker = Worker.build(spec)
    rank(worker)
    set_search_text(worker, text, chunk=2, with_reference=False)
    plan = exact_plan(worker.layout, uniform_rates(worker.layout, lambda _: 0.5), target=0.5)
    outputs: list[dict[Linear, torch.Tensor]] = []
    for pruned in (False, True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint_dir("opt"), dtype=torch.float32).eval()
        seen: dict[Linear, torch.Tensor] = {}
        for linear_spec in worker.layout:
            name = worker.replica.name(linear_spec).removesuffix(".weight")
            module = model.get_submodule(name)
            if pruned:
                module.weight.data[mask(worker, linear_spec.linear, plan)] = 0
            module.register_forward_hook(lambda _m, _a, out, key=linear_spec.linear, seen=seen: seen.update({key: out}))
        with torch.no_grad():
            model(text)
        outputs.append(seen)
    found = differences(worker, range(3), plan)
    for linear, squares in found.items():
        expected = (outputs[0][linear] - outputs[1][linear]).double().square().flatten(0, -2).sum(0)
        assert squares.tolist() == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-9)
    assert set(found) == {linear_spec.linear for linear_spec in worker.layout}
