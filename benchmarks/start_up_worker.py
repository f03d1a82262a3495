"""Starts one training and prints when each part of its start is over.

`python -m benchmarks.start_up_worker --KEY VALUE …` takes the arguments of loop/train.py.
"""

import os
import sys
import time
from collections.abc import Callable

BEGUN = "PLAINLOOP_BEGUN"  # environment variable: time.time() when the launcher was started
END_OF_PART = {  # a part ends when this function of loop/train.py has returned
    "rows and model checked": "check_model",
    "accelerator": "build_accelerator",
    "model": "build_optimizer",
    "engine": "prepare",
    "first step": "train_step",
}


def over(part: str) -> None:
    """On rank 0, prints that `part` is over, with the seconds since the launcher was started."""
    if os.environ.get("RANK", "0") == "0":
        print(f"@{part}@{time.time() - float(os.environ[BEGUN])}", flush=True)


def main(argv: list[str]) -> None:
    over("launcher")
    import torch  # noqa: F401

    over("torch")
    import loop.train

    over("other libraries")

    def timed(part: str, function: Callable[..., object]) -> Callable[..., object]:
        """Wraps `function`, so that it says that `part` is over; the process ends after the first step."""

        def call(*arguments: object) -> object:
            result = function(*arguments)
            over(part)
            if part == "first step":
                os._exit(0)
            return result

        return call

    for part, name in END_OF_PART.items():
        setattr(loop.train, name, timed(part, getattr(loop.train, name)))
    loop.train.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
