"""Cases in processes of their own, which are replaced when they die or hang."""

import itertools
import multiprocessing
import os
import resource
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from bad_inputs.all_cases import all_cases
from bad_inputs.case import Case
from bad_inputs.good import warm_up, write_good
from bad_inputs.harness import SECONDS, Outcome, run_case, silenced

_KILLED_S, _STARTED_S = 3 * SECONDS, 120
_BATCH = 400
"""Cases per process: libraries keep something of every model."""
_ADDRESS_BYTES = 24 * 2**30
"""What a process may allocate, so that a size from a file does not take the machine's memory."""


def outcomes_of(cases: Sequence[Case], folder: Path) -> Iterator[Outcome]:
    """Yield the outcomes of all cases, whatever happens to the process that runs them."""
    context = multiprocessing.get_context("spawn")
    waiting = list(cases)
    while waiting:
        ours, theirs = context.Pipe()
        child = context.Process(target=_serve, args=(theirs, folder), daemon=True)
        child.start()
        theirs.close()
        for number in range(min(_BATCH, len(waiting))):
            case = waiting.pop(0)
            ours.send(case.name)  # cases hold functions, which cannot be sent
            if ours.poll(_KILLED_S if number else _STARTED_S):
                try:
                    yield ours.recv()
                    continue
                except (EOFError, ConnectionResetError):
                    fault = "crash"
            else:
                fault = "hang"
            child.join(0 if fault == "hang" else 10)
            code = child.exitcode
            child.kill()
            yield Outcome(
                name=case.name, command=case.command or "neuronal-ray", reader=case.reader, seconds=_KILLED_S,
                fault=fault, line=f"the process ended with {code}",
            )  # fmt: skip
            break
        ours.close()
        child.join(10)
        child.kill()


def _serve(requests: Connection, folder: Path) -> None:
    """Run the cases that are asked for by name, until the other side closes."""
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    cases = {case.name: case for case in all_cases()}
    good = folder / "good"
    with silenced():
        if not good.exists():
            write_good(folder / f"good-{os.getpid()}")
            (folder / f"good-{os.getpid()}").rename(good)
        warm_up(good)
    for number in itertools.count():
        try:
            name = requests.recv()
        except EOFError:
            return
        # A path of its own: libraries cache by path.
        requests.send(run_case(cases[name], good=good, work=folder / f"{os.getpid()}-{number}"))
