"""How commands end: exit codes, one-line errors, a clean stop on SIGTERM."""

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Unfinished(RuntimeError):
    """Some of the work is done and kept, the rest failed; said already."""


def exit_code(prog: str, command: Callable[[], None]) -> int:
    """Run `command`: 0 when done, 2 for bad input (ValueError, one line), 1 for a failed task."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    logging.getLogger("neuronal_ray").handlers = [handler]  # other libraries' loggers have handlers of their own
    signal.signal(signal.SIGTERM, _stop)
    try:
        command()
    except ValueError as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except Unfinished as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


def _stop(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that what is under way is cleaned up."""
    raise SystemExit(128 + number)
