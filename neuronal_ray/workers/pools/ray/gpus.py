"""Which of the GPUs that a process sees is the one that Ray assigned to it, and whether two workers have the same.

Ray makes only the assigned GPU visible, so that it is the first. It leaves all visible where one of its
RAY_EXPERIMENTAL_NOSET_..._VISIBLE_DEVICES variables is set; what it assigned then has to be found among them.
"""

import os
from collections import Counter
from collections.abc import Sequence

import ray
import torch

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.worker import Worker

_GPU = "GPU"


def device_index(assigned: Sequence[str], visible: str | None, count: int) -> int:
    """Return the index, among the `count` GPUs that torch sees, of the one that Ray assigned.

    `assigned` are the ids that Ray gives: indices, or what the list `visible` of the environment has, such as UUIDs.
    Without a list all GPUs are visible, in their order. Raises BadInput where the assigned GPU is not among them.
    """
    if not assigned:
        raise BadInput("--device: Ray assigned no GPU to a worker that computes on one")
    name = assigned[0]
    if visible is None:
        names = [str(index) for index in range(count)]
    else:
        names = [entry.strip() for entry in visible.split(",")][:count]
    if name not in names:
        seen = "no list of visible devices" if visible is None else f"the visible devices {visible!r}"
        raise BadInput(
            f"--device: Ray assigned GPU {name!r} to a worker that sees {count} GPUs ({seen}); unset the variable that "
            "changes them after Ray has started"
        )
    return names.index(name)


def own_device() -> str:
    """Return the device of the GPU that Ray assigned to this process."""
    assigned = ray.get_runtime_context().get_accelerator_ids()[_GPU]
    return f"cuda:{device_index(assigned, _visible_devices(), torch.cuda.device_count())}"


def gpu_identity(worker: Worker) -> str:
    """Return what tells the worker's GPU from all others: its UUID, or the part of it that the worker was given."""
    index = worker.device.index or 0
    visible = _visible_devices()
    if visible is not None and visible.startswith("MIG-"):  # parts of one GPU, whose UUID they may report
        return visible.split(",")[index].strip()
    return str(torch.cuda.get_device_properties(index).uuid)


def check_distinct(identities: Sequence[str], *, shared: bool) -> None:
    """Raise BadInput when two workers are on the same GPU; `shared`: they are meant to be."""
    name, workers = Counter(identities).most_common(1)[0]
    if workers > 1 and not shared:
        raise BadInput(
            f"--device: {workers} workers are on the same GPU, {name}, though Ray has one for each; does each node "
            "have the GPUs that it was started with (ray start --num-gpus)?"
        )


def _visible_devices() -> str | None:
    """Return the list of visible devices that torch goes by; None where all are visible."""
    names = ("CUDA_VISIBLE_DEVICES",) if torch.version.hip is None else ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
    return next((os.environ[name] for name in names if name in os.environ), None)
