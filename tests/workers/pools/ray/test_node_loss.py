"""Does a run survive the loss of a node, and say in one line when the disk is full?"""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import prune_arguments, write_model, write_texts

import neuronal_ray.prune.__main__

pytestmark = pytest.mark.ray

RUN_S = 300

# In a process of its own: Ray remembers the token of the first cluster that a process meets.
ON_A_CLUSTER = """
import glob, json, os, sys, threading, time
os.environ.pop("RAY_ADDRESS", None)
import ray
from ray._private import state
from ray.cluster_utils import Cluster
import neuronal_ray.prune.__main__

sockets, journal, *arguments = sys.argv[1:]
checks = dict(health_check_initial_delay_ms=0, health_check_period_ms=500, health_check_timeout_ms=1000,
              health_check_failure_threshold=3)
# the head has no worker: with it the driver would go
shared = dict(object_store_memory=100 * 2**20, include_dashboard=False)
head = dict(num_cpus=0, _system_config=checks, temp_dir=sockets, **shared)
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = {}
for _ in range(3):
    node = cluster.add_node(num_cpus=1, **shared)
    nodes[node.node_id] = node
ray.init(address=cluster.address, log_to_driver=False)

def lose():
    while len(glob.glob(journal + "/*/*.safetensors")) < 2:
        time.sleep(0.02)
    hosts = [actor["Address"]["NodeID"] for actor in state.actors().values() if actor["State"] == "ALIVE"]
    cluster.remove_node(nodes[hosts[0]], allow_graceful=False)
    print("lost a node", file=sys.stderr, flush=True)

threading.Thread(target=lose, daemon=True).start()
code = neuronal_ray.prune.__main__.main([*arguments, "--address", cluster.address])
print("nodes left", sum(node["Alive"] for node in ray.nodes()), file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    return tmp_path


def test_a_run_survives_the_loss_of_a_node(folder: Path) -> None:
    lambdas = ",".join(f"{number / 2000:.4f}" for number in range(1, 400))
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, folder / "whole", block_lambdas=lambdas)) == 0
    arguments = prune_arguments(folder, folder / "out", block_lambdas=lambdas, replicas="1", shards="2", address=None)
    with tempfile.TemporaryDirectory(prefix="nr") as sockets:
        run = subprocess.run(
            [sys.executable, "-c", ON_A_CLUSTER, sockets, str(folder / ".out.journal"), *arguments],
            capture_output=True,
            text=True,
            timeout=RUN_S,
            check=False,
        )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "lost a node" in run.stderr
    assert "a new worker takes its place" in run.stderr
    assert "nodes left 3" in run.stderr
    (plan, whole) = ((folder / name / "allocation.parquet").read_bytes() for name in ("out", "whole"))
    assert plan == whole
    written = {n: t for file in (folder / "out").glob("*.safetensors") for n, t in load_file(file).items()}
    expected = load_file(folder / "whole" / "model.safetensors")
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name], tensor), name
