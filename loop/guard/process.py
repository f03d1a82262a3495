"""How a command ends that cannot go on: one message and an exit code, no traceback."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from data.errors import UserError

SECONDS_TO_SPEAK = 60.0  # at most, for rank 0 and for what is wrong on this rank perhaps alone
SECONDS_TO_STOP = 3.0  # at most, for rank 0 and for what all ranks have agreed on


class RunError(RuntimeError):
    """Something that stopped a run on its way, on all ranks alike. Its text says what, and what to do. Exit code 1."""


class Stopped(Exception):
    """A run was asked to stop by signal `number`, and did. Exit code 128 + number."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number = number


@contextmanager
def exit_codes() -> Iterator[None]:
    """Around a command: every rank comes to the same verdict and leaves; rank 0 says why."""
    try:
        yield
    except UserError as error:
        _leave(2, f"error: {error}")
    except RunError as error:
        _leave(1, f"error: {error}")
    except Stopped as stopped:
        if os.environ.get("RANK", "0") != "0":
            _wait_for_the_launcher(128 + stopped.number, SECONDS_TO_STOP)
        else:
            print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + stopped.number)


def _leave(code: int, text: str) -> NoReturn:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        _wait_for_the_launcher(code, SECONDS_TO_SPEAK)
        text = f"{text} (rank {rank})"  # still here: it is wrong on this rank alone
    print(text, file=sys.stderr, flush=True)
    sys.exit(code)


def _wait_for_the_launcher(code: int, seconds: float) -> None:
    """Rank 0 speaks and goes first, because a launcher ends the others by SIGTERM as soon as one is gone.

    A launcher that was told to stop itself has sent its SIGTERM already, and kills half a minute later.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(code))
    time.sleep(seconds)


def end_process(main: Callable[[Sequence[str]], None]) -> None:
    """Calls main with the command line, and ends with its exit code but without Python's own shutdown.

    In that, a thread of gloo or autograd that still lets go of a tensor aborts a process whose work is done
    (pytorch/pytorch#190489), and a tracker's exit hook may wait for a network. So no exit hook runs, and main leaves
    everything written. A debugger keeps Python's way, and with it its look at an exception.
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
