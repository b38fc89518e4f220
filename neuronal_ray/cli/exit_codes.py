"""How commands end: exit codes, one-line errors, a clean stop on SIGTERM."""

import logging
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType

from neuronal_ray.cli.errors import BadInput

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Unfinished(RuntimeError):
    """A command that stopped before its end; the message says why, what was kept and what to do next."""


class InternalError(Unfinished):
    """The same for a fault of ours, which is the cause of this error and is printed with its traceback."""


def exit_code(prog: str, command: Callable[[], None]) -> int:
    """Run `command` and return its exit code: 0 when done, 2 for bad input (one line), 1 for anything else.

    Only BadInput is the user's to mend. Any error but BadInput and Unfinished is ours and shows its traceback.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    logging.getLogger("neuronal_ray").handlers = [handler]  # other libraries' loggers have handlers of their own
    signal.signal(signal.SIGTERM, _stop)
    try:
        command()
    except BadInput as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    except InternalError as error:
        traceback.print_exception(error.__cause__)
        print(f"{prog}: internal error (traceback above); {error}", file=sys.stderr)
        return FAILED
    except Unfinished as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        print(f"{prog}: internal error (traceback above)", file=sys.stderr)
        return FAILED
    return DONE


def _stop(number: int, frame: FrameType | None) -> None:
    """Turn SIGTERM into an exception, so that temporary files are removed and workers ended."""
    raise SystemExit(128 + number)
