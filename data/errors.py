"""How a user's mistake ends: one message, exit code 2, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something a user got wrong. Its text says what, where, and how to mend it."""


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a command: every rank comes to the same verdict and leaves; rank 0 says why."""
    try:
        yield
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
