"""From options to a pool: where workers run, on which devices and in which dtype."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch

from neuronal_ray.algorithms.linear_pruner import LinearPruner
from neuronal_ray.cli.config import RunConfig
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.cli.memory import machine_bytes
from neuronal_ray.cli.threads import check_threads
from neuronal_ray.models.checkpoint import Checkpoint, empty_model
from neuronal_ray.workers.footprint import CHUNKS_PER_TASK, Devices, Fit, Footprint, Work, fit
from neuronal_ray.workers.pools.in_process import InProcessPool
from neuronal_ray.workers.pools.protocol import Pool
from neuronal_ray.workers.replica import CHUNK_TOKENS
from neuronal_ray.workers.spec import WorkerSpec


def resolve_address(config: RunConfig) -> str:
    """Return the address given; without one the Ray job's own cluster, a local Ray for several GPUs, or none."""
    if config.address is not None:
        return config.address
    if os.environ.get("RAY_ADDRESS"):
        return "auto"
    many = (config.replicas or 1) * (config.shards or 1) > 1
    return "local" if many or torch.cuda.device_count() > 1 else "none"


def check_device(config: RunConfig) -> None:
    """Raise BadInput when the workers' device, threads or Ray are not there, as far as that is known from here."""
    address = resolve_address(config)
    if address not in ("none", "local"):
        from neuronal_ray.workers.pools.ray.devices import check_joinable

        check_joinable(address)
        return
    check_threads(config.threads)
    if config.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device: no CUDA device on this machine")


def check_workers(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise BadInput for more shards than the model has blocks, or more workers than a Ray of this machine has CPUs."""
    num_blocks, shards = checkpoint.config.get_text_config().num_hidden_layers, config.shards or 1
    if shards > num_blocks:
        raise BadInput(f"--shards: {shards} shards of a model of {num_blocks} blocks; a shard has at least one")
    workers, cores = (config.replicas or 1) * shards, os.cpu_count() or 1
    joined = "ray" in sys.modules  # a Ray that this process has started may have more than the machine
    if resolve_address(config) == "local" and workers > cores and not joined:
        flag = "--replicas" if config.replicas is not None else "--shards"
        raise BadInput(f"{flag}: {workers} workers need {workers} CPUs, this machine has {cores}")


def work_of(config: RunConfig, checkpoint: Checkpoint, pruner: LinearPruner | None, *, held: int, on_gpu: bool) -> Work:
    """Return what workers hold for `pruner`, None for evaluation alone; `held` tokens pass through them as a whole.

    An evaluation holds its text before and after one block only: half of what is counted for a search text.
    """
    device = "cuda" if on_gpu else "cpu"
    return Work(
        item=item_bytes(config, checkpoint, on_gpu=on_gpu),
        held=max(held, CHUNKS_PER_TASK * CHUNK_TOKENS[device] // 2),
        device=device,
        ranks=pruner is not None and not pruner.solves,
        grams=pruner is not None and pruner.walks,
    )


def item_bytes(config: RunConfig, checkpoint: Checkpoint, *, on_gpu: bool) -> int:
    """Return the bytes of one weight on the workers' device."""
    if config.dtype != "auto":
        return 4 if config.dtype == "float32" else 2
    stored: torch.dtype | None = checkpoint.config.get_text_config().dtype
    return stored.itemsize if on_gpu and stored is not None else 4


def local_devices(device: str) -> Devices:
    """Return the GPUs of this machine, or the machine itself where it has none or `device` is "cpu"."""
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if count:
        return Devices(kind="GPU", memory=tuple(torch.cuda.mem_get_info(index)[1] for index in range(count)))
    return Devices(kind="node", memory=(machine_bytes(),))


def choose_fit(
    config: RunConfig, checkpoint: Checkpoint, pruner: LinearPruner | None, devices: Devices, *, held: int
) -> Fit:
    """Return shards and replicas on `devices`: those given, else by memory. Raises BadInput when nothing fits."""
    work = work_of(config, checkpoint, pruner, held=held, on_gpu=devices.kind == "GPU")
    model = empty_model(checkpoint, trust_remote_code=config.trust_remote_code)
    return fit(Footprint.of(model, work), devices, shards=config.shards, replicas=config.replicas)


@contextmanager
def open_pool(
    config: RunConfig, checkpoint: Checkpoint, *, pruner: LinearPruner | None = None, held: int = 0
) -> Iterator[Pool]:
    """Open the pool that `config` describes and close it on exit; without a pruner it evaluates the model as it is.

    `held` is the number of tokens that pass through the workers as a whole, for the choice of shards and replicas.
    """
    address = resolve_address(config)
    device = config.device
    if address == "none" and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = WorkerSpec(
        model_path=checkpoint.path,
        device=device,
        dtype=config.dtype,
        pruner=pruner or LinearPruner(),
        threads=config.threads,
        trust_remote_code=config.trust_remote_code,
        shards=config.shards or 1,
    )
    pool: Pool
    if address == "none":
        if device == "cuda":
            devices = local_devices(device)
            devices = replace(devices, memory=devices.memory[: spec.shards])
            single = replace(config, shards=spec.shards, replicas=1)
            spec = replace(spec, offload=choose_fit(single, checkpoint, pruner, devices, held=held).offload)
        pool = InProcessPool(spec)
    else:
        from neuronal_ray.workers.pools.ray.pool import RayPool

        choose = partial(choose_fit, config, checkpoint, pruner, held=held)
        pool = RayPool(spec, address=address, choose=choose, task_timeout_s=config.task_timeout)
    try:
        yield pool
    finally:
        pool.close()
