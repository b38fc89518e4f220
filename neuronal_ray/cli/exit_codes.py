"""How commands end: exit codes, one-line errors, a clean stop by signals."""

import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from neuronal_ray.cli.errors import BadInput

_LONGEST_LINE = 1000
DONE, FAILED, BAD_INPUT = 0, 1, 2


class Unfinished(RuntimeError):
    """A command that stopped before its end; the message says why, what was kept and what to do next."""


class InternalError(Unfinished):
    """The same for a fault of ours, which is the cause of this error and is printed with its traceback."""


class Stop:
    """The signal that ended the command: Ctrl-C, SIGTERM or SIGHUP; the first one counts, later ones are ignored.

    It is a KeyboardInterrupt, so that temporary files are removed, and workers ended, as after Ctrl-C: Ray makes an
    error of its own of anything else that is raised while it waits.
    """

    def __init__(self) -> None:
        self._first = signal.SIGINT
        self._begun = False

    @property
    def code(self) -> int:
        """The exit code, as shells have it: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self._first

    @property
    def reason(self) -> str:
        """What ended the command."""
        return "interrupted" if self._first == signal.SIGINT else f"stopped by {self._first.name}"

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals in the body, but for those that the parent had this process ignore, as nohup does."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before[number] = signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._begun:
            return
        self._begun, self._first = True, signal.Signals(number)
        raise KeyboardInterrupt


def one_line(message: str) -> str:
    """Return a message as a line that a terminal can show: control characters escaped, the middle of a long one cut."""
    words = " ".join(message.split())
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in words)
    return shown if len(shown) <= _LONGEST_LINE else f"{shown[: _LONGEST_LINE // 2]} ... {shown[-_LONGEST_LINE // 2 :]}"


def exit_code(prog: str, command: Callable[[], None]) -> int:
    """Run `command` and return its exit code: 0 when done, 2 for bad input (one line), 1 for anything else.

    Only BadInput is the user's to mend. Any error but BadInput and Unfinished is ours and shows its traceback.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    logging.getLogger("neuronal_ray").handlers = [handler]  # other libraries' loggers have handlers of their own
    stop = Stop()
    try:
        with stop.listening():
            command()
    except BadInput as error:
        print(f"{prog}: error: {one_line(str(error))}", file=sys.stderr)
        return BAD_INPUT
    except InternalError as error:
        traceback.print_exception(error.__cause__)
        print(f"{prog}: internal error (traceback above); {error}", file=sys.stderr)
        return FAILED
    except Unfinished as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as error:
        print(f"{prog}: {stop.reason}{f'; {error}' if str(error) else ''}", file=sys.stderr)
        return stop.code
    except Exception:
        traceback.print_exc()
        print(f"{prog}: internal error (traceback above)", file=sys.stderr)
        return FAILED
    return DONE
