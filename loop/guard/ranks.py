"""Sees when another rank has died or frozen; a collective call would wait for that rank for ever."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from data.errors import UserError
from loop.guard.process import RunError, Stopped

BEAT = 0.5  # seconds


class Watch:
    """A thread on every rank that gives signs of life and looks for those of the others while the context is open.

    It works on one machine only. The ranks share a small folder, in which each has a file; the time at which the file
    was written is its rank's sign of life. When another rank is gone, or silent for `timeout` seconds, the thread ends
    this process with a message that names the rank and the step; it kills a rank that is frozen. When the launcher is
    gone, the thread ends this process too, so that no rank stays behind alone.
    """

    def __init__(self, timeout: float, step: int, accelerator: Accelerator) -> None:
        self.timeout = timeout
        self.rank = accelerator.process_index
        self.step = step  # steps learned, which the caller keeps up to date for the message
        self.parent = os.getppid()
        self.over = threading.Event()
        self.ending = threading.Lock()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.pids: list[int] = gather_object([os.getpid()])  # collective
        one_machine = os.environ.get("LOCAL_WORLD_SIZE", "1") == os.environ.get("WORLD_SIZE", "1")
        self.active = accelerator.num_processes > 1 and one_machine
        folder = [tempfile.mkdtemp(prefix="plainloop-") if self.active and accelerator.is_main_process else None]
        broadcast_object_list(folder)  # collective
        self.folder = Path(folder[0] or "")
        if self.active:
            self._beat()
            accelerator.wait_for_everyone()

    def __enter__(self) -> "Watch":
        if self.active:
            self.before = signal.signal(signal.SIGTERM, self._terminated)
            self.thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.over.set()
        if not self.active:
            return
        self.thread.join()
        if error is None or isinstance(error, UserError | RunError | Stopped):  # every rank ends with the same error
            self._stop_listening()
            self._say("done")
            if self.rank == 0:
                self._wait_until(lambda: all(map(self._is_done, range(len(self.pids)))))
                self._clear()
            elif isinstance(error, Stopped):  # a rank that leaves before rank 0 makes the launcher end rank 0
                self._wait_until(lambda: not self.folder.exists())
            return
        deadline = time.monotonic() + 4 * BEAT
        while time.monotonic() < deadline:  # a rank's death breaks a collective before its process is gone
            if gone := self._gone():
                self._end(gone)
            time.sleep(BEAT / 10)
        self._stop_listening()  # not before: the launcher may see the death first, and its SIGTERM comes at once
        if self.rank == 0:
            self._clear()

    def _stop_listening(self) -> None:
        if signal.getsignal(signal.SIGTERM) == self._terminated:
            signal.signal(signal.SIGTERM, self.before)

    def _terminated(self, number: int, frame: FrameType | None) -> None:
        """Handles SIGTERM while StopSignals is not open. The launcher sends it when it has seen that a rank is gone,
        which may be before this rank has seen it."""
        if gone := self._gone():
            self._end(gone)
        else:
            self._clear()  # without the folder the other ranks end without a message
            os._exit(128 + number)

    def _end(self, problem: str) -> None:
        """Prints the problem and ends the process by os._exit: an orderly shutdown would wait for the missing rank."""
        if not self.ending.acquire(blocking=False):
            return  # another thread of this process is ending it already
        try:
            if self.folder.exists():  # without the folder another rank has printed the problem
                print(f"error: {problem}", file=sys.stderr, flush=True)
        finally:  # the print may fail, because its reader may be gone as well
            self._clear()
            os._exit(1)

    def _wait_until(self, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + self.timeout
        while not happened() and time.monotonic() < deadline:
            time.sleep(BEAT / 10)

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _beat(self) -> None:
        # A debugger halts all threads of its process, this one too, for as long as its user thinks.
        debugged = "debugpy" in sys.modules or "pydevd" in sys.modules
        self._say("debugged" if debugged else "alive")

    def _say(self, word: str) -> None:
        with contextlib.suppress(OSError):
            (self.folder / str(self.rank)).write_text(word)

    def _heard(self, rank: int) -> str:
        try:
            return (self.folder / str(rank)).read_text()
        except OSError:  # a rank that has ended has removed the folder
            return ""

    def _is_done(self, rank: int) -> bool:
        return self._heard(rank) == "done" or not lives(self.pids[rank])

    def _work(self) -> None:
        while True:
            before = time.time()
            if self.over.wait(BEAT):
                return
            self._beat()
            if time.time() - before > 4 * BEAT:  # this rank was halted itself: the others get time to beat first
                continue
            problem = self._gone() or self._frozen()
            if os.getppid() != self.parent:
                problem = f"step {self.step + 1}: the launcher is gone, and rank {self.rank} goes too."
            if problem and not self.over.is_set():
                self._end(problem)

    def _gone(self) -> str | None:
        for rank, pid in enumerate(self.pids):
            if not lives(pid) and self._heard(rank) != "done":
                return f"step {self.step + 1}: rank {rank} (process {pid}) died. Go on with --resume."
        return None

    def _frozen(self) -> str | None:
        for rank, pid in enumerate(self.pids):
            try:
                silent = time.time() - (self.folder / str(rank)).stat().st_mtime
            except OSError:
                continue
            if silent > self.timeout and self._heard(rank) not in ("debugged", "done"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return (
                    f"step {self.step + 1}: rank {rank} (process {pid}) has given no sign of life for {silent:.0f} s "
                    "and was killed. Go on with --resume."
                )
        return None


def lives(pid: int) -> bool:
    """Whether a process runs or sleeps. One that has ended does not live, even before its parent has asked for it."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
