"""What a run will do and need, said before any weight is loaded."""

import time

import torch

from neuronal_ray.composition import Composition
from neuronal_ray.config import PruneConfig
from neuronal_ray.core.masks import rank_dtype
from neuronal_ray.launch import resolve_address
from neuronal_ray.models.blocks import find_blocks, find_linears, weight_of
from neuronal_ray.models.checkpoint import empty_model
from neuronal_ray.pipeline import Inputs

_GIB = 2**30
_PROBE = 1024


def describe_run(config: PruneConfig, inputs: Inputs) -> str:
    """Model, budget, workers, memory of one worker and the tokens that pass through the blocks in each stage."""
    model = empty_model(inputs.checkpoint, trust_remote_code=config.trust_remote_code)
    _, blocks = find_blocks(model)
    shapes = [[weight_of(module).shape for module in find_linears(block).values()] for block in blocks]
    target = inputs.composition.target
    prunable = sum(rows * columns for block in shapes for rows, columns in block)
    largest = max(sum(rows * columns for rows, columns in block) for block in shapes)
    ranks = sum(rows * columns * rank_dtype(columns).itemsize for block in shapes for rows, columns in block)
    here = resolve_address(config) in ("none", "local")
    on_gpu = config.device != "cpu" and torch.cuda.is_available() if here else config.device != "cpu"
    item = _item_bytes(config, inputs, on_gpu=on_gpu)
    weights = sum(parameter.numel() for parameter in model.parameters()) * item
    tokens = tokens_by_stage(config, inputs)
    flops = 2 * prunable * sum(tokens.values())
    lines = [
        f"model       {config.model}: {type(model).__name__}, {len(blocks)} blocks, {prunable:,} prunable weights",
        f"budget      {round(target * prunable):,} weights removed ({target:.2%}), {_budget(inputs.composition)}",
        f"workers     address {resolve_address(config)}, replicas {config.replicas or 'one per GPU, or per node'}",
        f"memory      {(weights + ranks + largest * item) / _GIB:.2f} GiB per worker: weights {weights / _GIB:.2f}, "
        f"rankings {ranks / _GIB:.2f}, one pruned block {largest * item / _GIB:.2f}; activations come on top",
        *(f"tokens      {count:>12,} {stage}" for stage, count in tokens.items()),
        *(f"benchmark   {name}, dense and pruned (not in the time below)" for name in inputs.evaluations.benchmarks),
        f"arithmetic  {flops:.3g} floating-point operations in the blocks",
    ]
    if here:
        rate = _measured_rate(torch.device("cuda" if on_gpu else "cpu"), item)
        lines.append(f"time        about {flops / rate:.0f} s at this machine's {rate / 1e9:.0f} GFLOP/s, one worker")
    return "\n".join(lines)


def _item_bytes(config: PruneConfig, inputs: Inputs, *, on_gpu: bool) -> int:
    if config.dtype != "auto":
        return 4 if config.dtype == "float32" else 2
    stored: torch.dtype | None = inputs.checkpoint.config.get_text_config().dtype
    return stored.itemsize if on_gpu and stored is not None else 4


def _budget(composition: Composition) -> str:
    if composition.released:
        return "up to the released code's floors"
    return "exact" if composition.recipe.pattern is None else "as near as the pattern allows"


def tokens_by_stage(config: PruneConfig, inputs: Inputs) -> dict[str, int]:
    """Tokens that pass through all blocks, by stage."""
    composition, calibration = inputs.composition, inputs.calibration.numel()
    recipe = composition.recipe
    searched = config.search_samples * inputs.sequence_length
    tokens = {}
    if composition.dense_statistic is not None or (recipe.walks and not recipe.solves):
        tokens["dense pass over the calibration text"] = calibration
    passes = 2 if composition.released else 1  # the released code: the dense weights of each block as well
    for name, count in _candidates(config, composition).items():
        tokens[f"{name} step, {count} candidates"] = passes * count * searched
        if recipe.solves and not composition.released:
            tokens[f"{name} step, statistics for the solver"] = calibration
    if composition.row_step == "trim":
        tokens["rows by TRIM"] = calibration
    if composition.pruned_stream:
        tokens["final pass on the pruned stream"] = 2 * calibration
    elif recipe.solves:
        tokens["final pass on the dense stream"] = calibration
    for name, windows in inputs.evaluations.windows.items():
        tokens[f"perplexity on {name}, dense and pruned"] = 2 * windows.numel()
    return tokens


def _candidates(config: PruneConfig, composition: Composition) -> dict[str, int]:
    """Trials of NeuronAL's steps, the budget of adaptive; the searches of others depend on what they find."""
    if composition.allocation == "adaptive":
        return {"adaptive": config.search_budget}
    lambdas = {"block": len(config.block_lambdas), "row": len(config.row_lambdas)}
    if composition.row_step == "neuronal":
        return {"row": lambdas["row"]}
    if composition.allocation != "neuronal":
        return {}
    steps = composition.settings["steps"]
    return {name: count for name, count in lambdas.items() if steps in ("both", name)}


def _measured_rate(device: torch.device, item: int) -> float:
    """Floating-point operations per second of a matrix product on `device`."""
    dtype = torch.float32 if item == 4 else torch.bfloat16
    matrix = torch.ones(_PROBE, _PROBE, device=device, dtype=dtype)
    matrix @ matrix
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(10):
        product = matrix @ matrix
    float(product[0, 0])
    return 10 * 2 * _PROBE**3 / (time.perf_counter() - begin)
