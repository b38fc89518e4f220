"""The cluster files are accepted by their readers (KubeRay, Ray's launcher, compose, bash), and are safe."""

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

REPOSITORY = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
MANIFESTS = [
    "cluster/raycluster.yaml",
    "cluster/networkpolicy.yaml",
    "cluster/model-cache.yaml",
    "jobs/rayjob-prune.yaml",
    "jobs/rayjob-sweep.yaml",
]
SCRIPTS = ["cluster/slurm.sh", "jobs/slurm-prune.sbatch", "jobs/gpu.sh"]
OTHERS = {
    *("cluster/Dockerfile", "cluster/Dockerfile.dockerignore", "cluster/README.md"),
    *("cluster/ray-up.yaml", "cluster/docker-compose.yaml"),
}
STARTS_RAY = ["cluster/ray-up.yaml", "cluster/docker-compose.yaml", "cluster/slurm.sh"]

Document = dict[str, Any]


def documents(path: str) -> list[Document]:
    return list(yaml.safe_load_all((REPOSITORY / path).read_text()))


def kubernetes_errors(document: Document) -> list[str]:
    schema = yaml.safe_load((SCHEMAS / "kubernetes.yaml").read_text())
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(document)]


def ray_clusters() -> list[Document]:
    """The spec of every Ray cluster in the manifests."""
    found = [document for path in MANIFESTS for document in documents(path)]
    specs = [document["spec"] for document in found if document["kind"] == "RayCluster"]
    return specs + [document["spec"]["rayClusterSpec"] for document in found if document["kind"] == "RayJob"]


def pods(cluster: Document) -> list[Document]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def launcher_error(document: Document) -> str | None:
    try:
        validate_config(prepare_config(copy.deepcopy(document)))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error)
    return None


def test_every_file_of_the_folder_is_checked_here() -> None:
    here = {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "cluster").iterdir() if path.name != "token"}
    assert here == {path for path in {*MANIFESTS, *SCRIPTS, *OTHERS} if path.startswith("cluster/")}
    table = (REPOSITORY / "cluster" / "README.md").read_text()
    undocumented = {Path(path).name for path in here} - {"README.md", "Dockerfile.dockerignore"}
    assert not [name for name in undocumented if f"| `{name}` |" not in table]


# Kubernetes


@pytest.mark.parametrize("path", MANIFESTS)
def test_manifests_have_the_fields_of_their_kind(path: str) -> None:
    for document in documents(path):
        assert kubernetes_errors(document) == []


def misspell(spec: Document) -> None:
    spec["workerGroupSpecs"][0]["maxReplica"] = 3


def mistype(spec: Document) -> None:
    spec["workerGroupSpecs"][0]["minReplicas"] = "1"


def run_as_root(spec: Document) -> None:
    pods(spec)[0]["securityContext"]["runAsUser"] = 0


def forget_token(spec: Document) -> None:
    del spec["authOptions"]


def forget_who_runs(spec: Document) -> None:
    del pods(spec)[0]["securityContext"]["runAsNonRoot"]


def number_as_parameter(spec: Document) -> None:
    spec["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


@pytest.mark.parametrize("change", [misspell, mistype, run_as_root, forget_who_runs, forget_token, number_as_parameter])
def test_mistakes_in_manifests_are_caught(change: Callable[[Document], None]) -> None:
    (document,) = documents("cluster/raycluster.yaml")
    change(document["spec"])
    assert kubernetes_errors(document)


def test_an_unknown_submission_mode_is_caught() -> None:
    (document,) = documents("jobs/rayjob-prune.yaml")
    document["spec"]["submissionMode"] = "Sidecar"
    assert kubernetes_errors(document)


def test_clusters_in_manifests_are_alike_and_safe() -> None:
    clusters = ray_clusters()
    assert len(clusters) == 3
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["rayVersion"] == version("ray")
        (group,) = cluster["workerGroupSpecs"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        for pod in pods(cluster):
            (container,) = pod["containers"]
            assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]
            assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}
            assert all("value" not in one for one in container["env"] if "TOKEN" in one["name"])
        assert "nvidia.com/gpu" in pods(cluster)[1]["containers"][0]["resources"]["limits"]
        claims = {claim["metadata"]["name"] for claim in documents("cluster/model-cache.yaml")}
        used = [one.get("persistentVolumeClaim") for pod in pods(cluster) for one in pod["volumes"]]
        assert {one["claimName"] for one in used if one} == claims


def test_the_network_policy_is_of_the_clusters_pods() -> None:
    (policy,) = documents("cluster/networkpolicy.yaml")
    labels = policy["spec"]["podSelector"]["matchLabels"]
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    templates = [
        group["template"]
        for cluster in ray_clusters()
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    ]
    jobs = [document for path in MANIFESTS for document in documents(path) if document["kind"] == "RayJob"]
    templates += [job["spec"]["submitterPodTemplate"] for job in jobs]
    assert len(templates) == 8
    for template in templates:
        assert labels.items() <= template["metadata"]["labels"].items()


def test_jobs_end_with_their_clusters() -> None:
    for path in ("jobs/rayjob-prune.yaml", "jobs/rayjob-sweep.yaml"):
        (document,) = documents(path)
        spec = document["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert spec["activeDeadlineSeconds"] > 0
        assert spec["backoffLimit"] == 0 or "--resume" in spec["entrypoint"], "a retry would start from nothing"
        assert spec["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize("path", ["jobs/rayjob-prune.yaml", "jobs/rayjob-sweep.yaml", "jobs/slurm-prune.sbatch"])
def test_the_commands_in_jobs_are_ones_that_the_program_takes(path: str) -> None:
    text = (REPOSITORY / path).read_text().replace("\\\n", " ")
    command, words = re.findall(r"python -m neuronal_ray\.(\w+)((?:\s+[^\s#]+)+?)(?=\s*\n\s*\w+:|\s*$)", text)[0]
    arguments = words.replace("/opt/neuronal_ray", str(REPOSITORY)).replace('"', "").split()
    if command == "prune":
        from neuronal_ray.cli.options import parse_config
        from neuronal_ray.prune.config import PruneConfig

        assert parse_config(PruneConfig, arguments, prog="test", description="").resume
    else:
        assert Path(arguments[0]).is_file()
        assert "--resume" in arguments


# Ray's launcher, compose, docker


def test_the_launcher_takes_its_file() -> None:
    (document,) = documents("cluster/ray-up.yaml")
    assert launcher_error(document) is None
    workers = document["available_node_types"]["gpu"]
    assert workers["min_workers"] >= 1, "a run looks for workers once, at its start"
    mounted = {option.split(":")[-1] for option in document["docker"]["run_options"] if option.startswith("--volume")}
    assert mounted == {"/models", "/outputs"}


@pytest.mark.parametrize(
    ("key", "value"),
    [("max_worker", 3), ("max_workers", "many"), ("head_node_type", "nobody"), ("idle_timeout_minutes", "ten")],
)
def test_mistakes_in_the_launchers_file_are_caught(key: str, value: object) -> None:
    (document,) = documents("cluster/ray-up.yaml")
    assert launcher_error(document | {key: value})


def compose_errors(document: Document) -> list[str]:
    schema = json.loads((SCHEMAS / "compose-spec.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def test_compose_takes_its_file() -> None:
    (document,) = documents("cluster/docker-compose.yaml")
    assert compose_errors(document) == []
    broken = copy.deepcopy(document)
    broken["services"]["head"]["enviroment"] = {}
    assert compose_errors(broken)
    for service in document["services"].values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["secrets"] == ["ray_token"]
        assert "ports" not in service, "the dashboard is reached with `docker compose exec`"


def test_the_image_is_pinned_and_not_root() -> None:
    lines = (REPOSITORY / "cluster" / "Dockerfile").read_text().splitlines()
    (base,) = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert re.fullmatch(r"[\w./-]+:[\w.-]+", base)
    assert not base.endswith(":latest")
    assert [line for line in lines if line.startswith("USER")] == ["USER ray"]
    assert lines.index("USER ray") > max(number for number, line in enumerate(lines) if line.startswith("RUN"))
    assert any("--constraint constraints.txt" in line for line in lines)
    assert not [line for line in lines if line.startswith(("ADD", "ARG"))]
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((REPOSITORY / word).exists() for word in copied)
    kept = {
        line[1:] for line in (REPOSITORY / "cluster/Dockerfile.dockerignore").read_text().splitlines() if "!" in line
    }
    assert set(copied) <= kept


# Scripts


@pytest.mark.parametrize("path", SCRIPTS)
def test_scripts_are_sound(path: str) -> None:
    file = REPOSITORY / path
    assert "set -euo pipefail" in file.read_text()
    subprocess.run(["bash", "-n", file], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck")
    checked = subprocess.run(["shellcheck", file], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def openings(text: str) -> list[str]:
    """What leaves a Ray that this file starts open to others."""
    found = []
    if not re.search(r"RAY_AUTH_MODE(=|: )token\b", text):
        found.append("no token mode")
    if "RAY_AUTH_TOKEN_PATH" not in text or re.search(r"RAY_AUTH_TOKEN\s*[=:]", text):
        found.append("the token is not a file")
    heads, loopback = (len(re.findall(words, text)) for words in (r"--head\b", r"--dashboard-host=127\.0\.0\.1\b"))
    if heads == 0 or heads != loopback or "0.0.0.0" in text:
        found.append("the dashboard listens to others")
    return found


@pytest.mark.parametrize("path", STARTS_RAY)
def test_whatever_starts_a_head_asks_for_the_token_and_listens_on_loopback(path: str) -> None:
    text = (REPOSITORY / path).read_text()
    assert openings(text) == []
    assert openings(re.sub(r"(RAY_AUTH_MODE(=|: ))token", r"\1disabled", text)) == ["no token mode"]
    assert openings(text.replace("TOKEN_PATH", "TOKEN")) == ["the token is not a file"]
    for host in ("", "--dashboard-host=0.0.0.0"):
        assert openings(text.replace("--dashboard-host=127.0.0.1", host)) == ["the dashboard listens to others"]


def test_the_slurm_script_runs_its_command_on_a_pretended_allocation(tmp_path: Path) -> None:
    """srun, scontrol and ray are stood in for; what is tested is the script: order, token, clean-up, exit code."""
    tools = tmp_path / "tools"
    tools.mkdir()
    pretended = {
        "scontrol": "echo node1; echo node2",
        "srun": f'echo "$*" >> {tmp_path}/steps; while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "hostname": "echo 10.0.0.1 172.17.0.1",
        "ray": f'echo "$*" >> {tmp_path}/started; test -s "$RAY_AUTH_TOKEN_PATH"; exec sleep 60',
        "python3": f"if [[ $2 == *secrets* ]]; then echo 00ff; else wc -l < {tmp_path}/started; fi",
    }
    for name, body in pretended.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_ON_NODE": "32",
        "NEURONAL_RAY_PRIVATE": str(tmp_path),
    }
    report = 'echo "$RAY_ADDRESS $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH")"; exit 3'
    run = subprocess.run(
        [REPOSITORY / "cluster/slurm.sh", "bash", "-c", report],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 3, run.stderr
    assert run.stdout == "10.0.0.1:27550 token 600\n"
    head, worker = sorted((tmp_path / "started").read_text().splitlines(), key=lambda line: "--head" not in line)
    assert "--head" in head
    steps = (tmp_path / "steps").read_text().splitlines()
    assert all("--cpus-per-task=32" in step for step in steps if "ray start" in step), "a step would have one core"
    assert steps[-1].endswith("rm -rf /tmp/ray-4711")
    assert "--dashboard-host=127.0.0.1" in head
    assert "--address=10.0.0.1:27550" in worker
    assert not (tmp_path / ".ray-4711").exists(), "the token is left behind"
    assert subprocess.run(["pgrep", "-f", f"{tools}/ray"], check=False, capture_output=True).returncode == 1
    refused = subprocess.run(
        [REPOSITORY / "cluster/slurm.sh", "true"], env={"PATH": "/usr/bin:/bin"}, capture_output=True, check=False
    )
    assert refused.returncode != 0
    assert b"inside a Slurm allocation" in refused.stderr
