"""Takes SIGTERM and SIGINT, so that all ranks stop after the same step. A second signal stops its process at once."""

import os
import signal
import time
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0  # seconds in which a second signal counts as the first: a launcher passes on what its ranks got themselves


class StopSignals:
    """Remembers the first SIGTERM or SIGINT while the context is open."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0 while there was none
        self.when = 0.0

    def __enter__(self) -> "StopSignals":
        self.before = {number: signal.signal(number, self._take) for number in STOPPING}
        return self

    def __exit__(self, *error: object) -> None:
        if self.received:
            return  # the launcher sees this rank end and sends SIGTERM to the others, which are ending by themselves
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
        elif time.monotonic() - self.when > ECHO:
            os._exit(128 + self.received)  # no checkpoint is torn: each appears by one rename

    def agree(self, number: int) -> None:
        """Takes the signal `number`, which another rank may have received, for this rank's own; 0 changes nothing."""
        if number and not self.received:
            self.received, self.when = number, time.monotonic()
