"""The Ray cluster: joining it, and the memory of its GPUs, or of its nodes where there are none."""

import logging
import os
import signal
import threading

import ray
from ray._private.services import canonicalize_bootstrap_address
from ray.exceptions import AuthenticationError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from neuronal_ray.cli.address import check_reachable
from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.footprint import Devices
from neuronal_ray.workers.pools.ray.token import TOKEN_NEEDED, check_token, use_own_token

_OBJECT_STORE_BYTES = 2**30
_PROBE_TIMEOUT_S = 300.0
_NO_RAY = "--address: no Ray to join at {!r}; start one, or use --address local"


def check_joinable(address: str) -> None:
    """Raise BadInput unless a Ray answers at the address; for `auto`, at the one where `ray.init` would look.

    A machine remembers the last Ray that was started on it, even after it is gone: `ray.init` would try for minutes.
    """
    found = address
    if address == "auto" and not os.environ.get("RAY_ADDRESS"):
        try:
            found = canonicalize_bootstrap_address(address) or address
        except (ConnectionError, ValueError) as error:
            raise BadInput(_NO_RAY.format(address)) from error
    check_reachable(found)
    check_token(found)


def connect(address: str) -> None:
    """Join the Ray at `address`, or start one for `local`; BadInput when there is none to join."""
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # of tasks under way when another's error was raised
    if ray.is_initialized():
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        _join(address)
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray sets its own, which ends the process inside its C++ code


def _join(address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        use_own_token()
        try:
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        except ValueError as error:  # of this machine's memory, or of what RAY_... variables say
            raise BadInput(f"--address: no Ray can be started here ({error}); --address none needs none") from error
        return
    check_joinable(address)
    try:
        ray.init(address=address, **quiet)
    except AuthenticationError as error:
        raise BadInput(f"--address: {TOKEN_NEEDED.format(address)}") from error
    except (ConnectionError, ValueError) as error:
        raise BadInput(_NO_RAY.format(address)) from error


def disconnect() -> None:
    """Leave Ray, and end it if this process started it."""
    ray.shutdown()


def find_devices(device: str) -> Devices:
    """Return the cluster's GPUs (each GPU node reports their memory), or its nodes; `device` as in --device."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpu_nodes = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1]
    if device == "cpu" or not gpu_nodes:
        if device == "cuda":
            raise BadInput("--device: the Ray cluster has no GPU")
        computing = [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]
        if not computing:
            raise BadInput("--address: the Ray cluster has no node with a CPU to compute on; add workers first")
        return Devices(kind="node", memory=tuple(int(node["Resources"]["memory"]) for node in computing))
    queries = [
        ray.remote(_gpu_memory)
        .options(num_gpus=1, num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in gpu_nodes
    ]
    sizes = ray.get(queries, timeout=_PROBE_TIMEOUT_S)
    memory = [size for node, size in zip(gpu_nodes, sizes, strict=True) for _ in range(int(node["Resources"]["GPU"]))]
    return Devices(kind="GPU", memory=tuple(memory))


def _gpu_memory() -> int:
    import torch

    from neuronal_ray.workers.pools.ray.gpus import own_device

    _, total = torch.cuda.mem_get_info(torch.device(own_device()))
    return int(total)
