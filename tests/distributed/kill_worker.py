"""loop/train.py, which kills itself in the middle of saving.

KILL="<phase> <count> <whom>": at the count-th time that rank 0 comes to the phase, SIGKILL for `one` or `all` ranks.
"""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import loop.saving.checkpoint
import loop.saving.publish
import loop.train
from loop.guard.process import end_process

PHASES = {  # the phases of saving in order, each with the function that is about to be called
    "gather adapter": (loop.saving.checkpoint, "gather_adapter"),
    "gather optimizer": (loop.saving.checkpoint, "gather_optimizer"),
    "publish": (loop.saving.checkpoint, "publish"),
    "write adapter": (loop.saving.checkpoint, "write_adapter"),
    "check adapter": (loop.saving.checkpoint, "check_adapter"),
    "write optimizer": (loop.saving.checkpoint, "save_file"),
    "manifest": (loop.saving.publish, "file_fingerprint"),
    "sync": (loop.saving.publish, "sync"),
    "rename": (Path, "rename"),
    "delete old": (loop.saving.checkpoint, "delete_old"),
}


def siblings() -> list[int]:
    """The processes that the same launcher started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getppid():
            found.append(int(stat.parent.name))
    return found


def killing(call: Callable[..., Any], count: int, whom: str) -> Callable[..., Any]:
    times = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal times
        times += 1
        if times == count:
            others = [pid for pid in siblings() if pid != os.getpid()] if whom == "all" else []
            for pid in (*others, os.getpid()):
                os.kill(pid, signal.SIGKILL)
        return call(*args, **kwargs)

    return counted


def main(argv: Sequence[str]) -> None:
    plan = os.environ.get("KILL")
    if not plan or os.environ.get("RANK") != "0":
        loop.train.main(argv)
        return
    phase, count, whom = plan.rsplit(" ", 2)
    owner, name = PHASES[phase]
    with patch.object(owner, name, killing(getattr(owner, name), int(count), whom)):
        loop.train.main(argv)


if __name__ == "__main__":
    end_process(main)
