"""What a run will do and need, said before any weight is loaded."""

import time

import torch

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
    prunable = sum(rows * columns for block in shapes for rows, columns in block)
    largest = max(sum(rows * columns for rows, columns in block) for block in shapes)
    ranks = sum(rows * columns * rank_dtype(columns).itemsize for block in shapes for rows, columns in block)
    here = resolve_address(config) in ("none", "local")
    on_gpu = config.device != "cpu" and torch.cuda.is_available() if here else config.device != "cpu"
    item = _item_bytes(config, inputs, on_gpu=on_gpu)
    weights = sum(parameter.numel() for parameter in model.parameters()) * item
    tokens = _tokens(config, inputs)
    flops = 2 * prunable * sum(tokens.values())
    lines = [
        f"model       {config.model}: {type(model).__name__}, {len(blocks)} blocks, {prunable:,} prunable weights",
        f"budget      {round(config.sparsity * prunable):,} weights removed ({config.sparsity:.2%}), "
        + ("exact" if config.mode == "paper" else "up to the released code's floors"),
        f"workers     address {resolve_address(config)}, replicas {config.replicas or 'one per GPU, or per node'}",
        f"memory      {(weights + ranks + largest * item) / _GIB:.2f} GiB per worker: weights {weights / _GIB:.2f}, "
        f"rankings {ranks / _GIB:.2f}, one pruned block {largest * item / _GIB:.2f}; activations come on top",
        *(f"tokens      {count:>12,} {stage}" for stage, count in tokens.items()),
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


def _tokens(config: PruneConfig, inputs: Inputs) -> dict[str, int]:
    """Tokens that pass through all blocks, by stage."""
    calibration = inputs.calibration.numel()
    searched = config.search_samples * inputs.sequence_length
    lambdas = {"block": len(config.block_lambdas), "row": len(config.row_lambdas)}
    steps = lambdas if config.neuronal_steps == "both" else {config.neuronal_steps: lambdas[config.neuronal_steps]}
    passes = 2 if config.mode == "authors" else 1  # authors: the dense weights of each block as well
    tokens = {"dense pass over the calibration text": calibration} if config.mode == "paper" else {}
    if config.allocation == "neuronal":
        tokens |= {f"{name} step, {count} candidates": passes * count * searched for name, count in steps.items()}
    if config.final_stream == "pruned":
        tokens["final scores on the pruned stream"] = 2 * calibration
    for name, windows in inputs.windows.items():
        tokens[f"perplexity on {name}, dense and pruned"] = 2 * windows.numel()
    return tokens


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
