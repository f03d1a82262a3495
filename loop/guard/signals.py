"""SIGTERM and SIGINT: all ranks stop after the same step. A second one stops at once."""

import os
import signal
import time
from types import FrameType

from accelerate import Accelerator

from loop.engine.accelerator import largest_of_ranks

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds in which a signal is taken for the same one: a launcher passes on what a rank got as well


class StopSignals:
    """Takes SIGTERM and SIGINT while the context is open."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.received = 0  # the signal's number
        self.when = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._take) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        if self.received:
            return  # a launcher that sees one rank end stops the others, which are about to end by themselves
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > ECHO:
            os._exit(128 + self.received)  # nothing complete is lost: a checkpoint appears by one rename

    def agreed(self) -> int:
        """The signal that any rank has received, or 0; every rank enters. From then on each counts it as its own."""
        agreed = largest_of_ranks(self.received, self.accelerator)
        if agreed and not self.received:
            self.received, self.when = agreed, time.monotonic()
        return agreed
