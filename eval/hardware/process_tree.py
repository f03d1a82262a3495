"""Reads from /proc how much memory, CPU and disk a process and all its descendants use."""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

LOOK_EVERY = 2.0  # seconds that pass at least between two looks for new processes
LOOK_SHARE = 0.002  # largest share of a core for these looks, which walk through all processes of the machine
LAUNCHER_PROGRAMS = ("accelerate", "torchrun", "torch.distributed")


@dataclass(frozen=True)
class ProcessReading:
    """Holds the numbers of one process at one moment. A number is None where the system does not tell it."""

    cpu_seconds: float
    rss: int  # resident bytes
    shared: int  # resident bytes that belong to files or to shared memory
    swap: int | None  # swapped bytes
    read: int | None  # bytes read from disk since the process began
    written: int | None  # bytes written to disk since the process began


class ProcessTree:
    """Samples a process and its descendants, for which it looks again every few seconds.

    A process that was found once counts until it ends, even when its parent has ended before.
    """

    def __init__(self, pid: int) -> None:
        """Raises psutil.NoSuchProcess when there is no process `pid`."""
        self.root = psutil.Process(pid)
        self.processes: set[psutil.Process] = {self.root}
        self.ranks: dict[int, psutil.Process] = {}
        self.last: dict[psutil.Process, ProcessReading] = {}
        self.last_when = time.monotonic()
        self.next_look = 0.0
        self.sample(0)  # the use before this moment is no part of the first sample

    def sample(self, num_ranks: int) -> dict[str, float | None]:
        """Returns the cells of the tree and of `num_ranks` ranks. CPU and disk count since the sample before.

        CPU and disk of a process count only when both this sample and the one before have the process. Otherwise its
        use before the first sample, or its disappearance at its end, would look like a jump.
        """
        if time.monotonic() >= self.next_look:
            self._look()
        now = time.monotonic()
        readings: dict[psutil.Process, ProcessReading] = {}
        for process in self.processes:
            try:
                readings[process] = read_process(process)
            except psutil.Error:  # this process has ended
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
        """Looks for new processes of the tree, and for the ranks among them."""
        began = time.thread_time()
        known = {process for process in self.processes if process.is_running()}
        with contextlib.suppress(psutil.Error):  # the root has ended, but its descendants may go on
            known |= {self.root, *self.root.children(recursive=True)}
        self.processes = known
        self.ranks = find_ranks(self.root, known)
        self.next_look = time.monotonic() + max(LOOK_EVERY, (time.thread_time() - began) / LOOK_SHARE)


def read_process(process: psutil.Process) -> ProcessReading:
    """Reads the numbers of one process. Raises psutil.Error when the process has ended.

    Numbers for which the kernel would walk through the memory maps of the process are left out, as too expensive.
    """
    cpu, memory = process.cpu_times(), process.memory_info()
    if not memory.vms:  # the process has ended, but its parent has not waited for it yet
        raise psutil.NoSuchProcess(process.pid)
    read: int | None = None
    written: int | None = None
    # These errors mean that the process is another user's, or that the kernel has no such counters.
    with contextlib.suppress(psutil.AccessDenied, AttributeError):
        io = process.io_counters()
        read, written = io.read_bytes, io.write_bytes
    return ProcessReading(cpu.user + cpu.system, memory.rss, memory.shared, _swapped(process.pid), read, written)


def _less(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _sum(values: list[int | None]) -> int | None:
    """Returns the sum, or None when one of the values is None: a sum of the others would pass for the whole."""
    return None if None in values else sum(value for value in values if value is not None)


def _swapped(pid: int) -> int | None:
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return None
    _, found, rest = status.partition(b"VmSwap:")
    return int(rest.split(None, 1)[0]) * 1024 if found else None


def find_ranks(root: psutil.Process, processes: set[psutil.Process]) -> dict[int, psutil.Process]:
    """Returns the training processes by their rank, which stands in the environment that the launcher gave them.

    The helper processes of a rank have the same environment. They are told from the rank by their parent, which has
    the same rank as they have. Where no launcher was used, the root itself is rank 0.
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
    """Returns the rank that stands in the environment of a process, or None where there is no rank."""
    try:
        environment = process.environ()
    except (psutil.Error, OSError):
        return None
    one_process = "0" if "ACCELERATE_MIXED_PRECISION" in environment else ""
    rank = environment.get("RANK", one_process)
    return int(rank) if rank.isdigit() else None


def _is_launcher(process: psutil.Process) -> bool:
    """Says whether the process is a launcher, or may still become one."""
    try:
        words = process.cmdline()[:3]
    except psutil.Error:
        return True
    # A process whose command line is empty is about to begin.
    return not words or any(name in word for word in words for name in LAUNCHER_PROGRAMS)
