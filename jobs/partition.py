"""Is a run survived whose second node is cut off by the network? Needs root: two network namespaces on one machine.

python jobs/partition.py --rounds 3

A Ray head in one namespace, a node in the other, a pair of virtual links between them. `neuronal-ray prune` runs
beside the head with a replica on each node, or with one replica whose two shards lie on both; at a random moment after
its search began the link is taken down for good. A round is survived when the command ends with 0 and its weights
equal, bit for bit, those of a run that nothing disturbed.
"""

import argparse
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HEAD, _OTHER = "10.77.0.1", "10.77.0.2"
_RAY = [sys.executable, "-m", "ray.scripts.scripts"]
_LAYOUTS = {"2 replicas": ["--replicas", "2"], "2 shards": ["--shards", "2", "--replicas", "1"]}
_RUN_TIMEOUT_S = 400


def main() -> int:
    """Exit code 0 when every round was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which the link is cut")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("partition.py: network namespaces need root", file=sys.stderr)
        return 2
    source, survived = random.Random(arguments.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        expected = _prune(Path(folder) / "undisturbed", ["--address", "none"], {}, cut_after_s=None)
        for number in range(arguments.rounds):
            name = list(_LAYOUTS)[number % len(_LAYOUTS)]
            with _two_nodes() as environment:
                begin = time.monotonic()
                moment = source.uniform(0, 3)
                words = ["--address", f"{_HEAD}:6379", *_LAYOUTS[name]]
                found = _prune(Path(folder) / f"{number}", words, environment, cut_after_s=moment)
            survived += found == expected
            print(
                f"round {number + 1}: {name}, link cut {moment:.1f} s into the search, "
                f"{'survived' if found == expected else 'NOT survived'} in {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    print(f"{survived} of {arguments.rounds} survived")
    return 0 if survived == arguments.rounds else 1


@contextmanager
def _two_nodes() -> Iterator[dict[str, str]]:
    """A head and a node in namespaces of their own; the environment of who joins them."""
    with tempfile.TemporaryDirectory(prefix="nr") as sockets:
        environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        environment["RAY_USAGE_STATS_ENABLED"] = "0"
        _links()
        try:
            head = ["start", "--head", f"--node-ip-address={_HEAD}", "--port=6379", "--include-dashboard=false"]
            limits = ["--num-gpus=0", f"--object-store-memory={200 * 2**20}"]
            # room for two workers beside the head: the lost one is replaced there
            _inside("head", [*_RAY, *head, "--num-cpus=2", f"--temp-dir={sockets}", *limits], environment)
            _inside(
                "node",
                [*_RAY, "start", f"--address={_HEAD}:6379", f"--node-ip-address={_OTHER}", "--num-cpus=1", *limits],
                environment,
            )
            yield environment
        finally:
            for namespace in ("head", "node"):
                pids = subprocess.run(["ip", "netns", "pids", f"nr-{namespace}"], capture_output=True, text=True).stdout
                subprocess.run(["kill", "-9", *pids.split()], capture_output=True)
                subprocess.run(["ip", "netns", "delete", f"nr-{namespace}"], capture_output=True)


def _links() -> None:
    for namespace in ("head", "node"):
        subprocess.run(["ip", "netns", "delete", f"nr-{namespace}"], capture_output=True)
        _ip("netns", "add", f"nr-{namespace}")
    _ip("link", "add", "nr-a", "netns", "nr-head", "type", "veth", "peer", "name", "nr-b", "netns", "nr-node")
    for namespace, link, address in (("head", "nr-a", _HEAD), ("node", "nr-b", _OTHER)):
        _ip("-n", f"nr-{namespace}", "address", "add", f"{address}/24", "dev", link)
        _ip("-n", f"nr-{namespace}", "link", "set", link, "up")
        _ip("-n", f"nr-{namespace}", "link", "set", "lo", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def _inside(namespace: str, command: list[str], environment: dict[str, str]) -> None:
    whole = ["ip", "netns", "exec", f"nr-{namespace}", *command]
    done = subprocess.run(whole, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-500:]} {done.stderr[-2000:]}")


def _prune(output: Path, words: list[str], environment: dict[str, str], *, cut_after_s: float | None) -> bytes:
    """The weights of a run, which is cut off from the second node so many seconds after its search began."""
    options = ["--model", "builtin", "--calibration", "builtin", "--sequence-length", "128", "--evaluate", "none"]
    options += ["--calibration-samples", "32", "--mode", "paper", "--threads", "1", "--output", str(output), *words]
    prefix = [] if cut_after_s is None else ["ip", "netns", "exec", "nr-head"]
    log = output.with_suffix(".log")
    with log.open("w") as said:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "neuronal_ray.prune", *options],
            env={**os.environ, **environment},
            stdout=said,
            stderr=said,
        )
        while cut_after_s is not None and process.poll() is None and "block search" not in log.read_text():
            time.sleep(0.05)
        if cut_after_s is not None:
            time.sleep(cut_after_s)
            _ip("-n", "nr-node", "link", "set", "nr-b", "down")
        code = process.wait(_RUN_TIMEOUT_S)
    if code:
        print(log.read_text()[-2000:], file=sys.stderr)
        return b""
    return b"".join(file.read_bytes() for file in sorted(output.glob("model*.safetensors")))


if __name__ == "__main__":
    sys.exit(main())
