"""Does `ray job submit` run a pruning job on a cluster, and is its result the in-process one, byte for byte?"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
from tiny import prune_arguments, write_model, write_texts

import neuronal_ray
import neuronal_ray.prune.__main__

REPOSITORY = Path(neuronal_ray.__file__).parents[1]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
START_S, JOB_S, STOP_S = 90, 240, 20
BYTE_EQUAL = ("model.safetensors", "allocation.parquet")

pytestmark = pytest.mark.ray


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray head of our own on this machine."""

    address: str
    head: str
    metrics: str
    environment: dict[str, str]

    def ray(self, *arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        """`ray ARGUMENTS`, with its output."""
        return subprocess.run(
            [*RAY, *arguments], capture_output=True, text=True, timeout=timeout_s, env=self.environment, cwd=REPOSITORY
        )


def free_ports(count: int) -> list[str]:
    """Ports that nobody listens on; all are held until the last is known, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [str(opened.getsockname()[1]) for opened in sockets]


def stop(sockets: str) -> None:
    """End the processes whose command line has this temporary directory: `ray stop` would end every Ray here."""
    ours = [
        process for process in psutil.process_iter(["cmdline"]) if sockets in " ".join(process.info["cmdline"] or [])
    ]
    for process in list(ours):
        with suppress(psutil.NoSuchProcess):
            ours += process.children(recursive=True)
    for process in ours:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(ours, timeout=STOP_S)
    assert not alive, alive


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """`ray start --head` with a token, on ports and in a directory of its own."""
    home = tmp_path_factory.mktemp("home")
    token = home / "token"
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o600)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN")
    } | {
        "HOME": str(home),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_metrics_report_interval_ms": "1000",
    }
    head, dashboard, agent, agent_grpc, client, runtime, metrics = free_ports(7)
    cluster = Cluster(
        address=f"http://127.0.0.1:{dashboard}",
        head=f"127.0.0.1:{head}",
        metrics=f"http://127.0.0.1:{metrics}",
        environment=environment,
    )
    sockets = tempfile.mkdtemp(prefix="nr")  # sockets need short paths
    try:
        started = cluster.ray(
            *("start", "--head", "--disable-usage-stats", "--include-dashboard", "true", "--num-cpus", "2"),
            *("--num-gpus", "0", "--object-store-memory", str(200 * 2**20), "--temp-dir", sockets),
            *("--port", head, "--dashboard-host", "127.0.0.1", "--dashboard-port", dashboard),
            *("--dashboard-agent-listen-port", agent, "--dashboard-agent-grpc-port", agent_grpc),
            *("--ray-client-server-port", client, "--runtime-env-agent-port", runtime),
            *("--metrics-export-port", metrics),
            timeout_s=START_S,
        )
        assert started.returncode == 0, started.stdout + started.stderr
        yield cluster
    finally:
        stop(sockets)
        shutil.rmtree(sockets, ignore_errors=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    write_texts(tmp_path)
    return tmp_path


@pytest.fixture
def expected(folder: Path) -> Path:
    """The output of the same run in this process."""
    assert neuronal_ray.prune.__main__.main(prune_arguments(folder, folder / "expected")) == 0
    return folder / "expected"


def submit(cluster: Cluster, name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """`ray job submit` of a pruning run on the cluster that the job finds itself in; waits for its end."""
    index = arguments.index("--address")
    entry_point = ["python", "-m", "neuronal_ray.prune", *arguments[:index], *arguments[index + 2 :]]
    return cluster.ray(
        *("job", "submit", "--address", cluster.address, "--submission-id", name),
        *("--working-dir", str(REPOSITORY), "--", *entry_point),
        timeout_s=JOB_S,
    )


def status(cluster: Cluster, name: str) -> str:
    return cluster.ray("job", "status", "--address", cluster.address, name, timeout_s=START_S).stdout


def test_a_job_s_result_is_the_in_process_one(cluster: Cluster, folder: Path, expected: Path) -> None:
    begin = time.monotonic()
    submitted = submit(cluster, "good", prune_arguments(folder, folder / "out", replicas="2"))
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "SUCCEEDED" in status(cluster, "good").upper()
    logs = cluster.ray("job", "logs", "--address", cluster.address, "good", timeout_s=START_S).stdout
    for stage in (
        "loading 1/1 2 replicas",
        "block search 2/2 lambda",
        "row search 2/2",
        "checkpoint 1/1 model.safetensors",
    ):
        assert re.search(rf"^\[ *\d+\.\d s\] {re.escape(stage)}", logs, flags=re.MULTILINE), (stage, logs)
    for name in BYTE_EQUAL:
        assert (folder / "out" / name).read_bytes() == (expected / name).read_bytes(), name
    assert time.monotonic() - begin < JOB_S


def test_a_job_with_bad_input_fails_with_its_one_line(cluster: Cluster, folder: Path) -> None:
    submitted = submit(cluster, "bad", prune_arguments(folder, folder / "out", sequence_length="65"))
    assert submitted.returncode == 1, submitted.stdout + submitted.stderr
    assert "FAILED" in status(cluster, "bad").upper()
    assert "--sequence-length: 65 is beyond the model's context of 64" in submitted.stdout
    assert not (folder / "out").exists()


def test_a_submission_without_the_token_is_refused(cluster: Cluster, folder: Path) -> None:
    nameless = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_AUTH")}
    stranger = replace(cluster, environment=nameless | {"RAY_AUTH_MODE": "disabled"})
    wrong = folder / "wrong"
    wrong.write_text("f" * 64)
    impostor = replace(cluster, environment=cluster.environment | {"RAY_AUTH_TOKEN_PATH": str(wrong)})
    for number, other in enumerate((stranger, impostor)):
        submitted = submit(other, f"refused{number}", prune_arguments(folder, folder / "out"))
        assert submitted.returncode != 0
        assert re.search("token|auth", submitted.stdout + submitted.stderr, flags=re.IGNORECASE)
        assert "refused" not in cluster.ray("job", "list", "--address", cluster.address, timeout_s=START_S).stdout
    assert not (folder / "out").exists()


def test_a_command_without_the_token_says_so_in_one_line(cluster: Cluster, folder: Path) -> None:
    nameless = {key: value for key, value in cluster.environment.items() if not key.startswith("RAY_AUTH")}
    ended = subprocess.run(
        [sys.executable, "-m", "neuronal_ray.prune", *prune_arguments(folder, folder / "out", address=cluster.head)],
        capture_output=True,
        text=True,
        timeout=START_S,
        env=nameless,
        cwd=REPOSITORY,
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"neuronal-ray prune: error: --address: the Ray at '{cluster.head}' wants its token"), line
    assert not (folder / "out").exists()


def test_a_stopped_job_leaves_its_journal_alone_and_goes_on_from_it(cluster: Cluster, folder: Path) -> None:
    output = folder / "stopped"
    many = ",".join(f"{number / 8000:.6f}" for number in range(1, 1500))
    arguments = prune_arguments(folder, output, block_lambdas=many, replicas="1", shards="2")
    index = arguments.index("--address")
    entry_point = ["python", "-m", "neuronal_ray.prune", *arguments[:index], *arguments[index + 2 :]]
    options = (
        "--address",
        cluster.address,
        "--submission-id",
        "stopped",
        "--no-wait",
        "--working-dir",
        str(REPOSITORY),
    )
    assert cluster.ray("job", "submit", *options, "--", *entry_point, timeout_s=JOB_S).returncode == 0
    seen = ""
    give_up = time.monotonic() + JOB_S
    while time.monotonic() < give_up and not (
        len(list(folder.glob(".stopped.journal/*/*.safetensors"))) > 3
        and all(f"neuronal_ray_{name}" in seen for name in ("tasks", "tokens", "task_seconds", "peak_memory_bytes"))
        and '"trials"' in seen
    ):
        time.sleep(0.5)
        with suppress(OSError):
            seen = urllib.request.urlopen(f"{cluster.metrics}/metrics").read().decode()
    tasks = re.findall(r"^ray_neuronal_ray_tasks\w*{.*\"trials\".*} (\S+)$", seen, re.MULTILINE)
    assert tasks, [line for line in seen.splitlines() if "neuronal" in line]
    assert max(map(float, tasks)) >= 1
    for name in ("tokens", "task_seconds", "peak_memory_bytes"):
        assert f"neuronal_ray_{name}" in seen
    assert len(workers_of(cluster)) == 2
    assert cluster.ray("job", "stop", "--address", cluster.address, "stopped", timeout_s=JOB_S).returncode == 0
    assert "STOPPED" in status(cluster, "stopped").upper()
    give_up = time.monotonic() + STOP_S
    while workers_of(cluster) and time.monotonic() < give_up:
        time.sleep(0.2)
    assert not workers_of(cluster)
    left = {path.name for path in folder.iterdir() if "stopped" in path.name}
    assert left == {".stopped.journal"}
    kept = len(list(folder.glob(".stopped.journal/*/*.safetensors")))
    assert kept > 3


def workers_of(cluster: Cluster) -> list[int]:
    """Process ids of this Ray's workers that hold a shard."""
    home = cluster.environment["HOME"]
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if (process.info["cmdline"] or [""])[0].startswith("ray::ShardActor") and process.environ().get(
                "HOME"
            ) == home:
                found.append(process.pid)
    return found
