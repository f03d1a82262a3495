"""How a user's mistake ends: one message, exit code 2, no traceback."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def user_errors() -> Iterator[None]:
    """Around the preparation of a run, where a ValueError says what the user got wrong.

    Every rank comes to the same verdict and leaves; rank 0 says why.
    """
    try:
        yield
    except ValueError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
