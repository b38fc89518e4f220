"""How many lost workers does a run survive? Prunes again and again, kills workers at random, compares the weights.

python jobs/soak.py --rounds 50 --output runs/soak.json

Each round is `neuronal-ray prune` on a Ray of its own with two workers, of which one or two processes are killed
(SIGKILL) at random moments after the workers have started. A round is survived when the command ends with 0 and the
weights that it wrote equal, bit for bit, those of an undisturbed run.
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

_MARK = "NEURONAL_RAY_SOAK"
_ACTOR = b"ray::_ReplicaActor"
_RECIPES = {
    "neuronal, wanda": ["--mode", "paper"],
    "adaptive, wanda": ["--mode", "best", "--search-budget", "40"],
    "neuronal, sparsegpt": ["--mode", "paper", "--method", "sparsegpt"],
    "uniform, dsnot": ["--mode", "paper", "--allocation", "uniform", "--refinement", "dsnot"],
}


@dataclass(frozen=True, kw_only=True)
class Round:
    """One disturbed run; `kills_s` are seconds after the start at which a worker was killed."""

    recipe: str
    kills_s: tuple[float, ...]
    seconds: float
    code: int
    equal: bool
    replaced: int


def main() -> int:
    """Exit code 0 when every round was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and workers to kill")
    parser.add_argument("--output", type=Path, help="JSON file with every round")
    arguments = parser.parse_args()
    source = random.Random(arguments.seed)
    rounds: list[Round] = []
    with tempfile.TemporaryDirectory() as folder:
        undisturbed: dict[str, tuple[str, float]] = {}
        for name, words in _RECIPES.items():
            begin = time.monotonic()
            code, _ = _prune(words, Path(folder) / name, [])[:2]
            if code != 0:
                raise RuntimeError(f"the undisturbed run of {name} ended with {code}")
            undisturbed[name] = (_digest(Path(folder) / name), time.monotonic() - begin)
        for number in range(arguments.rounds):
            name = list(_RECIPES)[number % len(_RECIPES)]
            digest, usual = undisturbed[name]
            moments = sorted(source.uniform(0, 0.8 * usual) for _ in range(source.choice((1, 2))))
            output = Path(folder) / f"{number}"
            begin = time.monotonic()
            code, said, killed = _prune(_RECIPES[name], output, moments)
            rounds.append(
                Round(
                    recipe=name,
                    kills_s=tuple(killed),
                    seconds=time.monotonic() - begin,
                    code=code,
                    equal=code == 0 and _digest(output) == digest,
                    replaced=said.count("a new worker takes its place"),
                )
            )
            print(_line(rounds), flush=True)
            if code != 0:
                print(said[-2000:], file=sys.stderr)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(one) for one in rounds], indent=1) + "\n")
    return 0 if all(one.equal for one in rounds) else 1


def _line(rounds: list[Round]) -> str:
    last = rounds[-1]
    kills = sum(len(one.kills_s) for one in rounds)
    return (
        f"{len(rounds)} rounds, {sum(one.equal for one in rounds)} survived, {kills} workers killed; "
        f"last: {last.recipe}, killed at {', '.join(f'{s:.1f}' for s in last.kills_s) or '-'} s of {last.seconds:.1f} s"
    )


def _prune(words: list[str], output: Path, moments: list[float]) -> tuple[int, str, list[float]]:
    """The exit code of one run, what it said, and when a worker was killed: at `moments` after workers were seen."""
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
    command += ["--replicas", "2", "--threads", "1", "--output", str(output), *words]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, _MARK: mark})
        killed: list[float] = []
        while process.poll() is None and not _actors(mark):
            time.sleep(0.05)
        begin = time.monotonic()
        for moment in moments:
            while process.poll() is None and time.monotonic() - begin < moment:
                time.sleep(0.02)
            victims = _actors(mark)
            if process.poll() is None and victims:
                os.kill(random.Random(moment).choice(victims), signal.SIGKILL)
                killed.append(time.monotonic() - begin)
        code = process.wait()
        said.seek(0)
        return code, said.read(), killed


def _actors(mark: str) -> list[int]:
    """Process ids of the workers of the run that carries `mark` in its environment."""
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
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
