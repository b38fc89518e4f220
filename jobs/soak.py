"""Soak test: prune again and again, disturb the runs at random, and compare the weights.

python jobs/soak.py --rounds 50 --output runs/soak.json

Each round is `neuronal-ray prune` on its own local Ray with two workers (two replicas, or one replica of two shards)
and one kind of fault at random moments after the workers have started: workers are killed (SIGKILL), a worker hangs
(SIGSTOP), or the driver is killed and the command is repeated with --resume. With `--faults memory`, memory of the
node is used up until Ray's memory monitor ends workers. A run survives its round when the command ends with exit code 0
and its weights equal those of an undisturbed run, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

_MARK = "NEURONAL_RAY_SOAK"
_ACTOR = b"ray::ShardActor"
_FAULTS = ("killed", "killed", "hung", "driver")
_MEMORY = "memory"  # not by default: a node that stays short of memory ends a run, with one line
_MARGIN_BYTES, _TAKEN_BYTES, _TAKEN_S = 2**31, 3 * 2**30, 2.0
_TAKE = f"import numpy, time; taken = numpy.ones({_TAKEN_BYTES}, dtype=numpy.uint8); time.sleep({_TAKEN_S})"
_TASK_TIMEOUT_S = 8
_SETTINGS = {
    "neuronal, wanda": ["--mode", "paper"],
    "neuronal, wanda, 2 shards": ["--mode", "paper", "--shards", "2", "--replicas", "1"],
    "adaptive, wanda": ["--mode", "best", "--search-budget", "40"],
    "neuronal, sparsegpt": ["--mode", "paper", "--method", "sparsegpt"],
    "adaptive, wanda, 2 shards": ["--mode", "best", "--search-budget", "40", "--shards", "2", "--replicas", "1"],
    "uniform, dsnot": ["--mode", "paper", "--allocation", "uniform", "--refinement", "dsnot"],
}


@dataclass(frozen=True, kw_only=True)
class Round:
    """One disturbed run; `kills_s` are seconds after the start at which the fault was made."""

    setting: str
    fault: str
    kills_s: tuple[float, ...]
    seconds: float
    code: int
    equal: bool
    replaced: int


def main() -> int:
    """Return exit code 0 when every run survived its round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments of faults and of the workers to kill")
    parser.add_argument(
        "--faults", nargs="+", choices=sorted({*_FAULTS, _MEMORY}), help="these only (default: all but memory)"
    )
    parser.add_argument("--output", type=Path, help="JSON file with every round")
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed: dict[str, tuple[str, float]] = {}
        for name, words in _SETTINGS.items():
            begin = time.monotonic()
            code = _prune(words, Path(folder) / name, "none", [])[0]
            if code != 0:
                raise RuntimeError(f"the undisturbed run of {name} ended with {code}")
            undisturbed[name] = (_digest(Path(folder) / name), time.monotonic() - begin)
        for number in range(arguments.rounds):
            name = list(_SETTINGS)[number % len(_SETTINGS)]
            digest, usual = undisturbed[name]
            fault = source.choice(arguments.faults or _FAULTS)
            times = source.choice((1, 2)) if fault == "killed" else 1
            moments = sorted(source.uniform(0, 0.5 * usual) for _ in range(times))
            output = Path(folder) / f"{number}"
            begin = time.monotonic()
            code, output_text, killed = _prune(_SETTINGS[name], output, fault, moments)
            if fault == "driver" and killed:
                code, more, _ = _prune([*_SETTINGS[name], "--resume"], output, "none", [])
                output_text += more
            rounds.append(
                Round(
                    setting=name,
                    fault=fault,
                    kills_s=tuple(killed),
                    seconds=time.monotonic() - begin,
                    code=code,
                    equal=code == 0 and _digest(output) == digest,
                    replaced=output_text.count("a new worker takes its place"),
                )
            )
            print(_line(rounds), flush=True)
            if code != 0:
                print(output_text[-2000:], file=sys.stderr)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(done) for done in rounds], indent=1) + "\n")
    return 0 if all(done.equal for done in rounds) else 1


def _line(rounds: list[Round]) -> str:
    last = rounds[-1]
    kills = sum(len(done.kills_s) for done in rounds)
    return (
        f"{len(rounds)} rounds, {sum(done.equal for done in rounds)} survived, {kills} faults; "
        f"last: {last.setting}, {last.fault} at {', '.join(f'{s:.1f}' for s in last.kills_s) or '-'} s "
        f"of {last.seconds:.1f} s"
    )


def _prune(words: list[str], output: Path, fault: str, moments: list[float]) -> tuple[int, str, list[float]]:
    """Return the exit code and the output of a run, and when its faults were made: `moments` after workers began."""
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    command = [sys.executable, "-m", "neuronal_ray.prune", "--model", "builtin", "--calibration", "builtin"]
    command += [
        "--sequence-length",
        "128",
        "--calibration-samples",
        "32",
        "--evaluate",
        "builtin",
        "--address",
        "local",
    ]
    command += ["--threads", "1", "--task-timeout", str(_TASK_TIMEOUT_S), "--output", str(output), *words]
    if "--replicas" not in words:
        command += ["--replicas", "2"]
    with tempfile.TemporaryFile("w+") as printed:
        environment = {**os.environ, _MARK: mark, **(_watched_memory() if fault == _MEMORY else {})}
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
        killed: list[float] = []
        while process.poll() is None and not _actors(mark):
            time.sleep(0.05)
        begin = time.monotonic()
        for moment in moments:
            while process.poll() is None and time.monotonic() - begin < moment:
                time.sleep(0.02)
            victims = [process.pid] if fault == "driver" else _actors(mark)
            if process.poll() is None and victims and fault == _MEMORY:
                subprocess.run([sys.executable, "-c", _TAKE], check=True)
                killed.append(time.monotonic() - begin)
            elif process.poll() is None and victims:
                sent = signal.SIGSTOP if fault == "hung" else signal.SIGKILL
                os.kill(random.Random(moment).choice(victims), sent)
                killed.append(time.monotonic() - begin)
        code = process.wait()
        printed.seek(0)
        return code, printed.read(), killed


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


def _digest(output: Path) -> str:
    """Return a digest of all weights by name, whichever files they are in."""
    sha = hashlib.sha256()
    tensors = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
