"""Ends a command that cannot go on: with one message and an exit code, without a traceback."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from data.errors import UserError

SECONDS_TO_SPEAK = 60.0  # that other ranks give rank 0 to print an error, before they print their own
SECONDS_TO_STOP = 3.0  # that other ranks give rank 0 to end after a signal on which all have agreed


class RunError(RuntimeError):
    """An error in the middle of a run, the same on all ranks. Its text says what to do. The exit code is 1."""


class Stopped(Exception):
    """A run has stopped because signal `number` asked it to. The exit code is 128 + number."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


@contextmanager
def exit_codes() -> Iterator[None]:
    """Makes an exit code of the errors of a command. Every rank meets the same error and ends; rank 0 prints it."""
    try:
        yield
    except UserError as error:
        _leave(2, f"error: {error}")
    except RunError as error:
        _leave(1, f"error: {error}")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") != "0":
            wait_for_the_launcher(128 + stopped.number, SECONDS_TO_STOP)
        else:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + stopped.number)


def _leave(code: int, text: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        wait_for_the_launcher(code, SECONDS_TO_SPEAK)
        text = f"{text} (rank {rank})"  # this process still lives, so rank 0 did not meet the error
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def wait_for_the_launcher(code: int, seconds: float) -> None:
    """Waits for the launcher's SIGTERM, at most `seconds`, so that rank 0 prints its message and ends first.

    The launcher ends all other ranks by SIGTERM as soon as one has ended. A launcher that was itself told to stop has
    sent its SIGTERM before, and kills the ranks half a minute later.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
    time.sleep(seconds)


def end_process(main: Callable[[Sequence[str]], None]) -> None:
    """Calls main with the command line, and ends the process with main's exit code but without Python's own shutdown.

    In that shutdown a thread of gloo or autograd that still releases a tensor may abort a process whose work is done
    (pytorch/pytorch#190489), and the exit hook of a tracker may wait for a network. So no exit hook runs, and main has
    to have written everything. Under a debugger Python shuts down as usual, so that the debugger can show an exception.
    """
    if sys.gettrace() is not None:
        return main(sys.argv[1:])
    code: object = 0
    try:
        main(sys.argv[1:])
    except SystemExit as leaving:
        code = leaving.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
