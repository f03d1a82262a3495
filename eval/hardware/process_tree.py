"""A process and all its descendants: what they hold and use, read from /proc."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOK_EVERY = 2.0  # seconds between two looks for new processes, at least
LOOK_SHARE = 0.002  # of a core, at most, spent on these looks: they walk through all processes of the machine
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed")


@dataclass(frozen=True)
class Reading:
    """Of one process. None: the system does not tell."""

    cpu_seconds: float
    rss: int  # bytes, resident
    shared: int  # bytes of them that are of files or of shared memory
    swap: int | None  # bytes
    read: int | None  # bytes from disk, since it began
    written: int | None


class ProcessTree:
    """Found anew every few seconds. A process that was seen once counts until it ends, also without its parent."""

    def __init__(self, pid: int) -> None:
        """Raises psutil.NoSuchProcess."""
        self.root = psutil.Process(pid)
        self.processes: set[psutil.Process] = {self.root}
        self.ranks: dict[int, psutil.Process] = {}
        self.last: dict[psutil.Process, Reading] = {}
        self.last_when = time.monotonic()
        self.next_look = 0.0
        self.sample(0)  # what has been used so far is no part of the first sample

    def sample(self, num_ranks: int) -> dict[str, float | None]:
        """Cells of the tree and of `num_ranks` ranks; CPU and disk since the sample before.

        A process counts there from the second time that it is seen, so that neither what it used before nor what it
        takes away with its end shows as a jump.
        """
        if time.monotonic() >= self.next_look:
            self._look()
        now = time.monotonic()
        readings: dict[psutil.Process, Reading] = {}
        for process in self.processes:
            try:
                readings[process] = read_process(process)
            except psutil.Error:  # it has ended
                continue
        seconds = max(now - self.last_when, 1e-3)
        pairs = {
            process: (self.last[process], reading) for process, reading in readings.items() if process in self.last
        }
        cpu = {
            process: 100 * (after.cpu_seconds - before.cpu_seconds) / seconds
            for process, (before, after) in pairs.items()
        }
        self.processes, self.last, self.last_when = set(readings), readings, now
        cells: dict[str, float | None] = {
            "tree_cpu_percent": sum(cpu.values()),
            "tree_rss_bytes": sum(reading.rss for reading in readings.values()),
            "tree_shared_bytes": sum(reading.shared for reading in readings.values()),
            "tree_swap_bytes": _sum([reading.swap for reading in readings.values()]),
            "tree_disk_read_bytes": _sum([_less(after.read, before.read) for before, after in pairs.values()]),
            "tree_disk_write_bytes": _sum([_less(after.written, before.written) for before, after in pairs.values()]),
        }
        for rank, process in self.ranks.items():
            if rank < num_ranks and process in readings:
                cells[f"rank{rank}_rss_bytes"] = readings[process].rss
                cells[f"rank{rank}_cpu_percent"] = cpu.get(process)
        return cells

    def _look(self) -> None:
        began = time.thread_time()
        known = {process for process in self.processes if process.is_running()}
        with contextlib.suppress(psutil.Error):  # the root has ended; others may go on
            known |= {self.root, *self.root.children(recursive=True)}
        self.processes = known
        self.ranks = find_ranks(self.root, known)
        self.next_look = time.monotonic() + max(LOOK_EVERY, (time.thread_time() - began) / LOOK_SHARE)


def read_process(process: psutil.Process) -> Reading:
    """Raises psutil.Error when it has ended. What would walk through its memory maps is not asked for."""
    cpu, memory = process.cpu_times(), process.memory_info()
    if not memory.vms:  # ended, and its parent has not taken notice yet
        raise psutil.NoSuchProcess(process.pid)
    read: int | None = None
    written: int | None = None
    with contextlib.suppress(psutil.AccessDenied, AttributeError):  # another user's process; a kernel without it
        io = process.io_counters()
        read, written = io.read_bytes, io.write_bytes
    return Reading(cpu.user + cpu.system, memory.rss, memory.shared, _swapped(process.pid), read, written)


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _sum(values: list[int | None]) -> int | None:
    """None as soon as one is: a part would pass for the whole."""
    return None if None in values else sum(value for value in values if value is not None)


def _swapped(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return None
    _, found, rest = status.partition(b"VmSwap:")
    return int(rest.split(None, 1)[0]) * 1024 if found else None


def find_ranks(root: psutil.Process, processes: set[psutil.Process]) -> dict[int, psutil.Process]:
    """The training processes by their rank: what launchers put into their environment tells.

    The helpers of a rank have its environment too, but a parent with the same rank. Where no launcher was at work,
    the root itself is rank 0.
    """
    told = {process.pid: _told_rank(process) for process in processes}
    ranks: dict[int, psutil.Process] = {}
    for process in processes:
        try:
            rank = told[process.pid]
            if rank is not None and told.get(process.ppid()) != rank:
                ranks[rank] = process
        except psutil.Error:
            continue
    if not ranks and not _is_launcher(root):
        ranks[0] = root
    return ranks


def _told_rank(process: psutil.Process) -> int | None:
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return None
    one_process = "0" if "ACCELERATE_MIXED_PRECISION" in environment else ""
    rank = environment.get("RANK", one_process)
    return int(rank) if rank.isdigit() else None


def _is_launcher(process: psutil.Process) -> bool:
    try:
        words = process.cmdline()[:3]
    except psutil.Error:
        return True
    return not words or any(name in word for word in words for name in LAUNCHERS)  # none: about to begin
