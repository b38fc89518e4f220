"""Two models in one runtime, each in a process of its own, measured in alternating rounds."""

import json
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import neuronal_ray
from neuronal_ray.benchmark.runtimes import Opening
from neuronal_ray.benchmark.runtimes.child import ANSWER
from neuronal_ray.benchmark.runtimes.measured import Pair, Side


class RuntimeFailed(RuntimeError):
    """A process that exports or measures a model ended too early; the message has the last line that it wrote."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """The rounds: for each of `batches`, `rounds` times a prompt of `prompt` tokens and `tokens` generated ones."""

    rounds: int
    batches: tuple[int, ...]
    prompt: int
    tokens: int


class Measuring:
    """A process with a model, stopped between its rounds: threads that wait busily would slow the other process."""

    def __init__(self, python: str, module: str, opening: Opening, *, vocabulary: int, log: Path) -> None:
        order = asdict(opening) | {"path": str(opening.path), "module": module, "vocabulary": vocabulary}
        root = str(Path(neuronal_ray.__file__).parent.parent)
        number = str(opening.threads)
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "neuronal_ray.benchmark.runtimes.child", json.dumps(order)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": number, "HF_HUB_OFFLINE": "1"},
            )
        try:
            self.load_s = self._answer()["load_s"]
        except RuntimeFailed:
            self._end()
            raise
        self._process.send_signal(signal.SIGSTOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def round(self, *, sequences: int, rounds: Rounds) -> dict[str, float]:
        """Run one round; return its seconds."""
        job = {"sequences": sequences, "prompt": rounds.prompt, "tokens": rounds.tokens}
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise RuntimeFailed(self._last()) from error
        found = self._answer()
        self._process.send_signal(signal.SIGSTOP)
        return found

    def memory(self) -> dict[str, float]:
        """End the process; return the bytes that it held and their peak."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.close()
        return self._answer()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                found: dict[str, float] = json.loads(line.removeprefix(ANSWER))
                return found
        raise RuntimeFailed(self._last())

    def _last(self) -> str:
        self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        code = self._process.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{lines[-1]} ({how})" if lines else how

    def _end(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                stream.close()
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True, kw_only=True)
class Place:
    """How one of the two models is opened, and by which Python."""

    python: str
    module: str
    opening: Opening
    disk_bytes: int


def measure_pair(runtime: str, dense: Place, sparse: Place, *, rounds: Rounds, vocabulary: int, folder: Path) -> Pair:
    """Measure both models in alternating rounds, after a warm-up. Raises RuntimeFailed."""
    places = (dense, sparse)
    rates: tuple[dict[str, dict[int, list[float]]], ...] = (
        {"prefill": {}, "decode": {}},
        {"prefill": {}, "decode": {}},
    )
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                Measuring(
                    place.python,
                    place.module,
                    place.opening,
                    vocabulary=vocabulary,
                    log=folder / f"{runtime}-{index}.log",
                )
            )
            for index, place in enumerate(places)
        ]
        for batch in rounds.batches:
            for number in range(rounds.rounds + 1):
                for index in _order(number):
                    found = both[index].round(sequences=batch, rounds=rounds)
                    if number > 0:
                        prefill = batch * rounds.prompt / found["prefill_s"]
                        rates[index]["prefill"].setdefault(batch, []).append(prefill)
                        rates[index]["decode"].setdefault(batch, []).append(batch / found["step_s"])
        sides = [
            Side(
                disk_bytes=place.disk_bytes,
                load_s=process.load_s,
                peak_bytes=int(memory["peak_bytes"]),
                held_bytes=int(memory["held_bytes"]),
                prefill=rate["prefill"],
                decode=rate["decode"],
            )
            for place, process, rate in zip(places, both, rates, strict=True)
            for memory in [process.memory()]
        ]
    return Pair(runtime=runtime, dense=sides[0], sparse=sides[1])


def _order(number: int) -> Sequence[int]:
    """Return the order of the two models in a round: each goes first in turn."""
    return (0, 1) if number % 2 else (1, 0)
