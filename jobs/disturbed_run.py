"""A command of this project in a process of its own, disturbed at a given moment; see soak.py."""

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import IO

ON_RAY = ("worker", "hung", "node", "memory")
_MARK = "NEURONAL_RAY_SOAK"
_ACTOR = b"ray::ShardActor"
_LONGEST_S = 600
_MARGIN_BYTES, _TAKEN_BYTES, _TAKEN_S = 2**31, 3 * 2**30, 2.0
_TAKE = f"import numpy, time; taken = numpy.ones({_TAKEN_BYTES}, dtype=numpy.uint8); time.sleep({_TAKEN_S})"
_IMPORTED = ("prune.pipeline", "prune.dry_run", "sweep.pipeline", "sweep.dry_run", "report.run_page")
_IMPORTED = (*(f"neuronal_ray.{name}" for name in _IMPORTED), "transformers.models.llama.modeling_llama")
# In a process of its own, because Ray remembers the token of the first cluster that a process meets.
_CLUSTER = """
import os, sys, threading, time
os.environ.pop("RAY_ADDRESS", None)
import ray
from importlib import import_module
from ray._private import state
from ray.cluster_utils import Cluster

begun, moment, sockets, command, *arguments = sys.argv[1:]
checks = dict(health_check_initial_delay_ms=0, health_check_period_ms=1000, health_check_timeout_ms=5000,
              health_check_failure_threshold=5)
shared = dict(object_store_memory=100 * 2**20, include_dashboard=False)
head = dict(num_cpus=0, _system_config=checks, temp_dir=sockets, **shared)
cluster = Cluster(initialize_head=True, head_node_args=head)
nodes = [cluster.add_node(num_cpus=1, **shared) for _ in range(3)]
nodes = {node.node_id: node for node in nodes}
ray.init(address=cluster.address, log_to_driver=False)

def alive():
    return [actor["Address"]["NodeID"] for actor in state.actors().values() if actor["State"] == "ALIVE"]

def lose():
    while not alive():
        time.sleep(0.05)
    time.sleep(float(moment))
    if hosts := [node for node in alive() if node in nodes]:
        cluster.remove_node(nodes[hosts[0]], allow_graceful=False)
        open(begun, "w").write("lost")

threading.Thread(target=lose, daemon=True).start()
code = import_module(f"neuronal_ray.{command}.__main__").main([*arguments, "--address", cluster.address])
os._exit(code)
"""


class _Forked:
    """A fork of this process that runs a command; it prints into a pipe, which holds more than a command prints."""

    def __init__(self, words: Sequence[str], *, limit: int | None) -> None:
        for module in _IMPORTED:
            import_module(module)
        main = import_module(f"neuronal_ray.{words[0]}.__main__").main
        self.returncode: int | None = None
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            code = main(words[1:])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        os.close(writer)
        self.printed = os.fdopen(reader)

    def poll(self) -> int | None:
        """Return the exit code of a command that has ended, negative for a signal."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = None if pid == 0 else os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float) -> None:
        """Wait until the command has ended."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise TimeoutError(f"a command has not ended after {timeout:.0f} s")
            time.sleep(0.02)


class DisturbedRun:
    """A command in a process of its own; without Ray a fork of this one, which spares it the imports."""

    def __init__(
        self,
        words: Sequence[str],
        place: Path,
        *,
        on_ray: bool,
        limit: int | None = None,
        node_s: float | None = None,
        memory: bool = False,
    ) -> None:
        self._place, self._mark = place, f"{os.getpid()}-{time.monotonic_ns()}"
        self._output = Path(words[words.index("--output") + 1])
        self._sockets = tempfile.TemporaryDirectory(prefix="nr")
        self._process: _Forked | subprocess.Popen[str]
        self._printed: IO[str]
        if not on_ray:
            self._process = _Forked(words, limit=limit)
            self._printed = self._process.printed
            return
        command = [sys.executable, "-m", f"neuronal_ray.{words[0]}", *words[1:]]
        if node_s is not None:
            begun = str(place / "begun")
            command = [sys.executable, "-c", _CLUSTER, begun, str(node_s), self._sockets.name, *words]
        environment = {**os.environ, _MARK: self._mark, **(_watched_memory() if memory else {})}
        self._printed = (place / "printed").open("w+")
        self._process = subprocess.Popen(
            command, stdout=self._printed, stderr=subprocess.STDOUT, env=environment, text=True
        )

    @property
    def code(self) -> int:
        """The exit code of the command, which has ended."""
        assert self._process.returncode is not None
        return self._process.returncode

    def text(self) -> str:
        """Return what was printed, once."""
        if self._printed.seekable():
            self._printed.seek(0)
        return self._printed.read()

    def wait_after_start(self) -> float:
        """Wait for the end; return the seconds since work began."""
        self._wait_for_start(on_ray=False)
        begin = time.monotonic()
        self._end()
        return time.monotonic() - begin

    def disturb(self, fault: str, moments: Sequence[float], *, on_ray: bool, source: random.Random) -> list[float]:
        """Make the fault `moments` after work began and wait for the end; return when it was made."""
        made: list[float] = []
        if fault not in ("none", "disk", "node"):
            self._wait_for_start(on_ray=on_ray)
            begin = time.monotonic()
            for moment in moments:
                while self._process.poll() is None and time.monotonic() - begin < moment:
                    time.sleep(0.01)
                victims = _actors(self._mark) if fault in ON_RAY else [self._process.pid]
                if self._process.poll() is None and victims:
                    _hurt(fault, source.choice(victims))
                    made.append(time.monotonic() - begin)
        self._end()
        if fault == "node" and (self._place / "begun").is_file():
            made = list(moments)
        if fault == "disk" and self.code != 0:
            made = [0.0]
        return made

    def _wait_for_start(self, *, on_ray: bool) -> None:
        """Wait until the first worker is there; without Ray, until something is written."""

        def begun() -> bool:
            if on_ray:
                return bool(_actors(self._mark))
            return self._output.exists() or any(self._place.glob(f".{self._output.name}.*"))

        while self._process.poll() is None and not begun():
            time.sleep(0.02)

    def _end(self) -> None:
        self._process.wait(timeout=_LONGEST_S)


def _hurt(fault: str, victim: int) -> None:
    """Make a fault; a victim that has ended meanwhile stays as it is."""
    if fault == "memory":
        subprocess.run([sys.executable, "-c", _TAKE], check=True)
        return
    signals = {"hung": signal.SIGSTOP, "terminated": signal.SIGTERM}
    with suppress(ProcessLookupError):
        os.kill(victim, signals.get(fault, signal.SIGKILL))


def _watched_memory() -> dict[str, str]:
    """Return settings that let Ray's monitor end a worker when a little more memory is used than now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    used = sizes["MemTotal"] - sizes["MemAvailable"]
    threshold = (used + _MARGIN_BYTES) / sizes["MemTotal"]
    return {"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "100"}


def _actors(mark: str) -> list[int]:
    """Return the process ids of the workers of the run that has `mark` in its environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            named = (entry / "cmdline").read_bytes().startswith(_ACTOR)
            if named and f"{_MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return sorted(found)
