"""Try all bad inputs on all commands, and count: `make soak`.

Exit code 1 when any case failed.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bad_inputs.all_cases import all_cases, sample
from bad_inputs.harness import Outcome
from bad_inputs.processes import outcomes_of

_COLUMNS = ("tracebacks", "hangs", "silent successes", "files left or touched", "other")


def main() -> int:
    """Run the cases, print a line for each failure and a table."""
    parser = argparse.ArgumentParser(description=__doc__, prog="bad_inputs")
    parser.add_argument("--only", action="append", default=[], help="cases with this in their name; may be repeated")
    parser.add_argument("--sample", type=int, help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file with every case")
    arguments = parser.parse_args()
    cases = [case for case in all_cases() if not arguments.only or any(word in case.name for word in arguments.only)]
    if arguments.sample is not None:
        cases = sample(cases, arguments.sample, seed=arguments.seed)
    begin = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        for outcome in outcomes_of(cases, Path(folder)):
            outcomes.append(outcome)
            if outcome.fault:
                print(f"{outcome.name}\n    {outcome.fault}: {outcome.line}", flush=True)
    failed = sum(bool(outcome.fault) for outcome in outcomes)
    print(_table("command", outcomes))
    print(_table("reader", outcomes))
    print(f"\n{len(outcomes)} inputs tried in {time.monotonic() - begin:.0f} s, {failed} failed")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    return 1 if failed else 0


def _kind(fault: str) -> str:
    """The column of a fault."""
    if fault in ("traceback", "crash"):
        return "tracebacks"
    if fault == "hang":
        return "hangs"
    if fault == "silent success":
        return "silent successes"
    return "files left or touched" if fault.startswith(("left", "touched")) else "other"


def _table(field: str, outcomes: Sequence[Outcome]) -> str:
    """Return a Markdown table with a row per command or reader."""
    tried = Counter(getattr(outcome, field) for outcome in outcomes)
    faults = Counter((getattr(outcome, field), _kind(outcome.fault)) for outcome in outcomes if outcome.fault)
    lines = ["", f"| {field} | tried | {' | '.join(_COLUMNS)} |", "|---" * (2 + len(_COLUMNS)) + "|"]
    for name, count in tried.items():
        lines.append(f"| {name} | {count} | {' | '.join(str(faults[name, column]) for column in _COLUMNS)} |")
    total = [sum(faults[name, column] for name in tried) for column in _COLUMNS]
    lines.append(f"| all | {len(outcomes)} | {' | '.join(map(str, total))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
