"""jobs/submit.py starts the given command, prints no passed value, and ends with the exit code of the program."""

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Self

import pytest
import ray.job_submission
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

SCRIPT = Path(__file__).parents[2] / "jobs" / "submit.py"
COMMAND = ["--", "prune", "--model", "a b", "--sparsity", "0.7"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("submit", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.0)
    return module


class Cluster:
    """Stands in for the client of a cluster: one job that is looked at twice, then over."""

    def __init__(self, status: JobStatus, code: int | None) -> None:
        self.status, self.code = status, code
        self.interrupted = False
        self.looks = 0
        self.address = ""
        self.job: dict[str, Any] = {}
        self.stopped: list[str] = []

    def __call__(self, address: str) -> Self:
        self.address = address
        return self

    def submit_job(self, **job: Any) -> str:
        self.job = job
        return "job1"

    def get_job_status(self, job: str) -> JobStatus:
        self.looks += 1
        if self.interrupted:
            raise KeyboardInterrupt
        return self.status if self.looks > 1 else JobStatus.RUNNING

    def get_job_logs(self, job: str) -> str:
        return "one\n" if self.looks == 1 else "one\ntwo\n"

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message="what went wrong")

    def stop_job(self, job: str) -> None:
        self.stopped.append(job)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://elsewhere:8265")
    pretended = Cluster(JobStatus.SUCCEEDED, 0)
    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", pretended)
    return pretended


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 1, 1),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -15, 143),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_exit_code_is_the_programs(
    script: ModuleType, cluster: Cluster, status: JobStatus, code: int | None, expected: int
) -> None:
    cluster.status, cluster.code = status, code
    assert script.main(COMMAND) == expected


def test_logs_are_printed_once_and_the_address_is_the_one_asked_for(
    script: ModuleType, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script.main(["--address", "http://127.0.0.1:1", *COMMAND]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert cluster.address == "http://127.0.0.1:1"
    assert "RAY_ADDRESS" not in script.os.environ
    assert "RAY_API_SERVER_ADDRESS" not in script.os.environ
    assert cluster.job["entrypoint"] == "python -m neuronal_ray.prune --model 'a b' --sparsity 0.7"
    assert "working_dir" not in cluster.job["runtime_env"], "nothing is uploaded unless asked for"


def test_variables_are_passed_by_name_and_never_printed(
    script: ModuleType, cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "the value")
    options = ["--pass", "HF_TOKEN", "--working-dir", ".", "--exclude", "runs", "--exclude", "data"]
    assert script.main([*options, *COMMAND]) == 0
    assert cluster.job["runtime_env"] == {
        "env_vars": {"HF_TOKEN": "the value"},
        "working_dir": ".",
        "excludes": ["runs", "data"],
    }
    printed = capsys.readouterr()
    assert "the value" not in printed.out + printed.err


def test_control_c_stops_the_job(script: ModuleType, cluster: Cluster) -> None:
    cluster.interrupted = True
    assert script.main(COMMAND) == 130
    assert cluster.stopped == ["job1"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--", "train"], "'train' is not a command"),
        (["--pass", "NOT_SET_ANYWHERE", *COMMAND], "NOT_SET_ANYWHERE not set"),
        (["--exclude", "runs", *COMMAND], "--exclude: needs --working-dir"),
    ],
)
def test_bad_input_is_refused_before_anything_is_submitted(
    script: ModuleType, cluster: Cluster, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        script.main(arguments)
    assert refused.value.code == 2
    assert reason in capsys.readouterr().err
    assert not cluster.job


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            AuthenticationError("Unauthorized"),
            "--address: http://127.0.0.1:8265 wants its token: set RAY_AUTH_MODE=token",
        ),
        (ConnectionError("refused"), "--address: no Ray answers at http://127.0.0.1:8265"),
    ],
    ids=str,
)
def test_a_ray_that_cannot_be_asked_is_one_line(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: str,
) -> None:
    def refuse(address: str) -> None:
        raise error

    monkeypatch.setattr(ray.job_submission, "JobSubmissionClient", refuse)
    assert script.main(COMMAND) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"submit.py: error: {expected}")
