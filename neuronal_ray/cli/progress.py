"""Progress of long work: bars on a terminal, lines in a log, and every event in events.jsonl."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """The stages of a run, one after the other; `seconds` holds how long each took. `quiet`: print nothing."""

    def __init__(self, events: Path | None = None, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self.seconds: dict[str, float] = {}
        self._events = events
        self._start = time.perf_counter()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Callable[[str], None]]:
        """Run a stage of `total` steps; yield the function to call, with a note, when a step is done."""
        begin = time.perf_counter()
        terminal = sys.stderr.isatty()
        bar = tqdm(total=total, desc=f"{name:<16}", leave=True, disable=not terminal or self._quiet, file=sys.stderr)
        done, last_line = 0, 0.0

        def advance(note: str) -> None:
            nonlocal done, last_line
            done += 1
            now = time.perf_counter()
            bar.set_postfix_str(note, refresh=False)
            bar.update()
            self._record(stage=name, done=done, total=total, note=note)
            if not terminal and not self._quiet and (done == total or now - last_line > _SECONDS_BETWEEN_LINES):
                last_line = now
                remaining = (now - begin) / done * (total - done)
                line = f"[{now - self._start:7.1f} s] {name} {done}/{total} {note}"
                print(f"{line}, {remaining:.0f} s left" if done < total else line, file=sys.stderr, flush=True)

        try:
            yield advance
        finally:
            bar.close()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def _record(self, **event: object) -> None:
        if self._events is not None:
            with self._events.open("a") as file:
                file.write(json.dumps({"seconds": round(time.perf_counter() - self._start, 3)} | event) + "\n")
