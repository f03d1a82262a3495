"""How a command ends that cannot go on: one message and an exit code, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something a user got wrong. Its text says what, where, and how to mend it. Exit code 2."""


class RunError(RuntimeError):
    """Something that stopped a run on its way, on all ranks alike. Its text says what, and what to do. Exit code 1."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Around a command: every rank comes to the same verdict and leaves; rank 0 says why."""
    try:
        yield
    except (UserError, RunError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
