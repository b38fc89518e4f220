"""A description of what a run will do and need, before any weight is loaded."""

import time
from dataclasses import replace

import torch

from neuronal_ray.data.window_start import AUTO
from neuronal_ray.evaluate.window_start import READ
from neuronal_ray.models.blocks import find_blocks, find_linears, weight_of
from neuronal_ray.models.checkpoint import empty_model
from neuronal_ray.models.shape_checks import check_shapes
from neuronal_ray.models.stored_zeros import stored_zeros
from neuronal_ray.prune.compose import Composition
from neuronal_ray.prune.config import PruneConfig
from neuronal_ray.prune.input_zeros import check_target, describe_zeros
from neuronal_ray.prune.inputs import Inputs, held_tokens
from neuronal_ray.prune.window_start import deciding_windows
from neuronal_ray.workers.footprint import GIB, Devices, Footprint, fit
from neuronal_ray.workers.pools.launch import local_devices, resolve_address, work_of

_PROBE = 1024
_LESS_SAMPLES, _LESS_LENGTH = 32, 512
_LONG_S, _MUCH = 600.0, 0.75
"""Runs that are longer than this are offered with less calibration text, if that takes at most this share."""
_START = {
    "papers": "the papers have them (--window-start papers)",
    "bos": "BOS and the text (--window-start bos)",
    "auto": "the dense model reads a few better, with BOS or without (--window-start auto)",
}


def describe_run(config: PruneConfig, inputs: Inputs) -> str:
    """Return model, zeros, budget, workers, memory of a worker, and the tokens that pass the blocks in each stage.

    Reads the weights once, to count their zeros: a target below the input's sparsity is refused here as in the run.
    """
    model = empty_model(inputs.checkpoint, trust_remote_code=config.trust_remote_code)
    _, blocks = find_blocks(model)
    check_shapes(model)
    target = inputs.composition.target
    prunable = sum(weight_of(linear).numel() for block in blocks for linear in find_linears(block).values())
    zeros = stored_zeros(inputs.checkpoint, trust_remote_code=config.trust_remote_code)
    check_target(target, inputs.composition.pruner, zeros=zeros, prunable=prunable)
    address = resolve_address(config)
    devices = local_devices(config.device) if address in ("none", "local") else _cluster_devices(config)
    if address == "none":  # this process is one replica
        devices = replace(devices, memory=devices.memory[: config.shards or 1])
    pruner = inputs.composition.pruner
    work = work_of(config, inputs.checkpoint, pruner, held=held_tokens(config, inputs), on_gpu=devices.kind == "GPU")
    footprint = Footprint.of(model, work)
    shards = 1 if address == "none" and config.shards is None else config.shards
    chosen = fit(footprint, devices, shards=shards, replicas=config.replicas)
    tokens = tokens_by_stage(config, inputs)
    flops = 2 * prunable * sum(tokens.values())
    lines = [
        f"model       {config.model}: {type(model).__name__}, {len(blocks)} blocks, {prunable:,} prunable weights",
        f"input       {describe_zeros(inputs.composition.pruner, zeros=zeros, prunable=prunable)}",
        f"budget      {round(target * prunable):,} weights removed ({target:.2%}), {_budget(inputs.composition)}",
        f"workers     address {address}, {devices}: {chosen}",
        f"memory      of all workers: weights {sum(footprint.weights) / GIB:.2f} GiB in the blocks, rankings "
        f"{sum(footprint.ranks) / GIB:.2f}; in each worker {footprint.outside / GIB:.2f} outside the blocks, "
        f"{footprint.passing / GIB:.2f} for activations",
        f"windows     begin as {_START[inputs.window_start.used]}",
        *(f"tokens      {count:>12,} {stage}" for stage, count in tokens.items()),
        *(f"benchmark   {name}, dense and pruned (not in the time below)" for name in inputs.evaluations.benchmarks),
        f"arithmetic  {flops:.3g} floating-point operations in the blocks",
    ]
    if address in ("none", "local"):
        rate = _measured_rate(torch.device("cuda" if devices.kind == "GPU" else "cpu"), work.item)
        speed = rate * (chosen.replicas if devices.kind == "GPU" else 1)
        lines.append(f"time        {time_needed(config, inputs, seconds_per_token=2 * prunable / speed)}")
    return "\n".join(lines)


def time_needed(config: PruneConfig, inputs: Inputs, *, seconds_per_token: float) -> str:
    """Return how long the run takes, and where that is long, how long it takes with less calibration text."""
    seconds = seconds_per_token * sum(tokens_by_stage(config, inputs).values())
    less = replace(
        config,
        calibration_samples=min(_LESS_SAMPLES, config.calibration_samples),
        search_samples=min(_LESS_SAMPLES, config.search_samples),
    )
    length = min(_LESS_LENGTH, inputs.sequence_length)
    drawn = replace(inputs.drawn, tokens=inputs.calibration[: less.calibration_samples, :length])
    fewer = replace(inputs, drawn=drawn, sequence_length=length)
    quick = seconds_per_token * sum(tokens_by_stage(less, fewer).values())
    words = f"about {duration(seconds)} at the speed of this machine's matrix products"
    if seconds < _LONG_S or quick > _MUCH * seconds:
        return words
    flags = f"--calibration-samples {less.calibration_samples} --sequence-length {length}"
    return f"{words}; at {flags} about {duration(quick)}"


def duration(seconds: float) -> str:
    """Return a time with as many digits as an estimate deserves: 40 s, 25 min, 4 h 10 min, 3 days 4 h."""
    if seconds < 90:
        return f"{_rounded(seconds, 5 if seconds > 20 else 1)} s"
    minutes = seconds / 60
    if minutes < 87.5:
        return f"{_rounded(minutes, 5 if minutes > 20 else 1)} min"
    tens = _rounded(minutes, 10)
    if tens < 48 * 60:
        return f"{tens // 60} h" + (f" {tens % 60} min" if tens % 60 else "")
    hours = _rounded(minutes / 60, 1)
    return f"{hours // 24} days" + (f" {hours % 24} h" if hours % 24 else "")


def _rounded(value: float, step: int) -> int:
    """Return the nearest multiple of `step`, at least one."""
    return max(step, step * round(value / step))


def _cluster_devices(config: PruneConfig) -> Devices:
    """Return the devices of the Ray cluster that the run would join."""
    from neuronal_ray.workers.pools.ray.devices import connect, find_devices

    connect(resolve_address(config))
    return find_devices(config.device)


def _budget(composition: Composition) -> str:
    if composition.released:
        return "up to the released code's floors"
    return "exact" if composition.pruner.pattern is None else "as near as the pattern allows"


def tokens_by_stage(config: PruneConfig, inputs: Inputs) -> dict[str, int]:
    """Return how many tokens pass through all blocks in each stage."""
    composition, calibration = inputs.composition, inputs.calibration.numel()
    pruner = composition.pruner
    searched = config.search_samples * inputs.sequence_length
    tokens = {}
    if inputs.window_start.used == AUTO:
        windows = deciding_windows(config, inputs)[:READ]
        tokens["window start, few windows without and with BOS"] = 2 * windows.numel() - len(windows)
    if composition.dense_statistic is not None or (pruner.walks and not pruner.solves):
        tokens["dense pass over the calibration text"] = calibration
    passes = 2 if composition.released else 1  # the released code: the dense weights of each block as well
    for name, count in composition.candidates().items():
        tokens[f"{name} step, {count} candidates"] = passes * count * searched
        if pruner.solves and not composition.released:
            tokens[f"{name} step, statistics for the solver"] = calibration
    if composition.rows is not None and composition.rows.reads_calibration:
        tokens[f"rows by {composition.row_step}"] = calibration
    if composition.pruned_stream:
        tokens["final pass on the pruned stream"] = 2 * calibration
    elif pruner.solves:
        tokens["final pass on the dense stream"] = calibration
    for name, text in inputs.evaluations.windows.items():
        tokens[f"perplexity on {name}, dense and pruned"] = 2 * text.tokens.numel()
    return tokens


def _measured_rate(device: torch.device, item: int) -> float:
    """Return the floating-point operations per second of a matrix product on `device`."""
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
