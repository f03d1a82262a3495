"""loop/train.py, which writes tracker.json: the seconds that its loop and its end waited for what tracks it.

BREAK_TRACKER=1: every log of the tracker raises.
"""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import loop.train
from loop.guard.process import end_process
from loop.recipe import parse_recipe
from loop.telling.tracking import Tracking


def main(argv: Sequence[str]) -> None:
    waited = 0.0

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal waited
            before = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                waited += time.perf_counter() - before

        return wrapper

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("the tracker is broken")

    with ExitStack() as patches:
        for name in ("__init__", "log", "__exit__"):
            patches.enter_context(patch.object(Tracking, name, timed(getattr(Tracking, name))))
        if "BREAK_TRACKER" in os.environ:
            patches.enter_context(patch("accelerate.tracking.SwanLabTracker.log", broken))
        loop.train.main(argv)
    (Path(str(parse_recipe(argv)[1].run_dir)) / "tracker.json").write_text(json.dumps({"seconds": waited}))


if __name__ == "__main__":
    end_process(main)
