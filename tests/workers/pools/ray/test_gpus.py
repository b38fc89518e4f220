"""Does each worker compute on the GPU that Ray assigned to it, whatever else the process sees?"""

import os
import subprocess
import sys

import pytest

from neuronal_ray.cli.errors import BadInput
from neuronal_ray.workers.pools.ray.gpus import check_distinct, device_index

NOSET = "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("assigned", "visible", "count", "expected"),
    [
        (["3"], "3", 1, 0),  # as Ray does by default: only the assigned one is visible
        (["3"], None, 8, 3),  # all are left visible
        (["0"], None, 1, 0),
        (["3"], "2,3", 2, 1),  # a list inherited from Slurm
        (["7"], "5, 7", 2, 1),
        (["GPU-b1"], "GPU-a0,GPU-b1,GPU-c2", 3, 1),
        (["MIG-2"], "MIG-1,MIG-2", 2, 1),
        (["2", "3"], "2,3", 2, 0),
    ],
)
def test_the_assigned_gpu_is_found(assigned: list[str], visible: str | None, count: int, expected: int) -> None:
    assert device_index(assigned, visible, count) == expected


@pytest.mark.parametrize(
    ("assigned", "visible", "count"),
    [
        ([], None, 2),
        (["2"], None, 2),
        (["GPU-b1"], None, 2),
        (["1"], "5,7", 2),
        (["7"], "5,7", 1),  # the driver has fewer than the list
        (["0"], "", 0),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(assigned: list[str], visible: str | None, count: int) -> None:
    with pytest.raises(BadInput, match="--device: "):
        device_index(assigned, visible, count)


def test_two_workers_on_one_gpu_are_refused_unless_they_share_it() -> None:
    check_distinct(["a", "b", "c"], shared=False)
    check_distinct(["a", "a"], shared=True)
    with pytest.raises(BadInput, match="--device: 2 workers are on the same GPU, a,"):
        check_distinct(["a", "b", "a"], shared=False)


PROGRAM = """
import os
import ray
import torch
from neuronal_ray.workers.pools.ray import gpus

class Fake:
    def device(self):
        torch.cuda.device_count = lambda: COUNT
        return gpus.own_device()

COUNT = {count}
ray.init(address="local", include_dashboard=False, num_cpus=2, num_gpus=2, object_store_memory=100 * 2**20)
actors = [ray.remote(Fake).options(num_gpus=1, num_cpus=1).remote() for _ in range(2)]
print("devices", *sorted(ray.get([actor.device.remote() for actor in actors])))
"""


@pytest.mark.ray
@pytest.mark.parametrize(
    ("variables", "count", "expected"),
    [
        ({}, 1, "cuda:0 cuda:0"),  # each sees its own GPU alone
        ({NOSET: "1"}, 2, "cuda:0 cuda:1"),
        ({NOSET: "1", "CUDA_VISIBLE_DEVICES": "5,7"}, 2, "cuda:0 cuda:1"),
        ({NOSET: "1", "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2, "cuda:0 cuda:1"),
        ({"CUDA_VISIBLE_DEVICES": "5,7"}, 1, "cuda:0 cuda:0"),
    ],
    ids=str,
)
def test_actors_of_a_ray_with_two_gpus(
    tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str], count: int, expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "CUDA_"))}
    environment |= variables | {"HOME": str(tmp_path_factory.mktemp("home"))}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(count=count)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert f"devices {expected}\n" in ended.stdout, ended.stdout + ended.stderr
