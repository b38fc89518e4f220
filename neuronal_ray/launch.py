"""From a configuration to a pool: where workers run, on what device and in which dtype."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from neuronal_ray.config import RunConfig
from neuronal_ray.models.checkpoint import Checkpoint
from neuronal_ray.pool import InProcessPool, Pool
from neuronal_ray.recipe import Recipe
from neuronal_ray.worker import WorkerSpec


def resolve_address(config: RunConfig) -> str:
    """The address asked for; without one the Ray job's own cluster, a local Ray for several GPUs, or none."""
    if config.address is not None:
        return config.address
    if os.environ.get("RAY_ADDRESS"):
        return "auto"
    many = config.replicas is not None and config.replicas > 1
    return "local" if many or torch.cuda.device_count() > 1 else "none"


def check_device(config: RunConfig) -> None:
    """Raise ValueError when the device asked for is not on this machine and the workers would run here."""
    if config.device == "cuda" and resolve_address(config) in ("none", "local") and not torch.cuda.is_available():
        raise ValueError("--device: no CUDA device on this machine")


@contextmanager
def open_pool(
    config: RunConfig,
    checkpoint: Checkpoint,
    *,
    recipe: Recipe | None = None,
) -> Iterator[Pool]:
    """The pool that `config` asks for, closed on exit; without a recipe it evaluates the model as it is."""
    address = resolve_address(config)
    device = config.device
    if address == "none" and device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = WorkerSpec(
        model_path=checkpoint.path,
        device=device,
        dtype=config.dtype,
        recipe=recipe or Recipe(),
        threads=config.threads,
        trust_remote_code=config.trust_remote_code,
    )
    pool: Pool
    if address == "none":
        pool = InProcessPool(spec)
    else:
        from neuronal_ray.distributed.ray_pool import RayPool

        pool = RayPool(spec, address=address, replicas=config.replicas)
    try:
        yield pool
    finally:
        pool.close()
