"""Samples the hardware from outside while a process runs: `python -m eval.monitor --pid PID`.

Each sample is one row of samples.csv, with cells about the machine, the process tree of PID, its ranks and the GPUs. A
cell is empty where this system does not tell the value.
"""

import argparse
import contextlib
import csv
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from data.errors import UserError
from eval.hardware.nvml import gpu_columns, open_gpus, sample_gpus
from eval.hardware.process_tree import ProcessTree
from loop.guard.process import exit_codes

INTERVAL = 0.5  # seconds
INTERVALS = (0.05, 60.0)  # the shortest and the longest interval that make sense, in seconds


@dataclass(frozen=True)
class Sampling:
    """Says what the sampling itself has cost."""

    samples: int
    cpu_seconds: float
    share_of_a_core: float  # cpu_seconds divided by the seconds from the start to the last sample


def columns(num_ranks: int, num_gpus: int) -> list[str]:
    """Returns the names of the columns of samples.csv."""
    return [
        "seconds",
        "machine_cpu_percent",
        "tree_cpu_percent",
        "machine_used_bytes",
        "tree_rss_bytes",
        "tree_shared_bytes",
        "tree_swap_bytes",
        *(f"rank{rank}_{name}" for rank in range(num_ranks) for name in ("rss_bytes", "cpu_percent")),
        "tree_disk_read_bytes",
        "tree_disk_write_bytes",
        *gpu_columns(num_gpus),
    ]


class Monitor:
    """Runs a thread that samples the process `pid` and its descendants into `file` while the context is open.

    `cost` says afterwards what the sampling took. When the file cannot be written, the sampling ends with a warning,
    and the program goes on.
    """

    def __init__(self, pid: int, file: Path, interval: float = INTERVAL, num_ranks: int = 1) -> None:
        """Raises psutil.NoSuchProcess when there is no process `pid`."""
        self.file, self.interval, self.num_ranks = file, interval, num_ranks
        self.started = time.monotonic()
        self.tree = ProcessTree(pid)
        self.cost = Sampling(0, 0.0, 0.0)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> "Monitor":
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.thread.join()

    def _work(self) -> None:
        try:
            self._sample()
        except OSError as error:
            print(f"warning: {self.file} cannot be written, no more samples: {error.strerror}", flush=True)

    def _sample(self) -> None:
        gpus = open_gpus()
        psutil.cpu_percent()  # the first call in a thread returns nothing useful: counting begins there
        names = columns(self.num_ranks, len(gpus))
        with self.file.open("w", newline="", encoding="utf-8") as file:
            rows = csv.DictWriter(file, names)
            rows.writeheader()
            while not self.over.wait(self._until_next()):
                tree = self.tree.sample(self.num_ranks)
                if not self.tree.processes:
                    return  # all processes have ended
                cells = {
                    "seconds": time.monotonic() - self.started,
                    "machine_cpu_percent": psutil.cpu_percent(),
                    "machine_used_bytes": psutil.virtual_memory().used,
                    **tree,
                    **sample_gpus(gpus),
                }
                rows.writerow({name: _text(cell) for name, cell in cells.items()})
                file.flush()
                spent = time.thread_time()
                self.cost = Sampling(
                    self.cost.samples + 1, round(spent, 4), round(spent / (time.monotonic() - self.started), 6)
                )

    def _until_next(self) -> float:
        """Returns the seconds until the next sample.

        Samples are due at multiples of the interval. A sample that was missed is left out.
        """
        return self.interval - (time.monotonic() - self.started) % self.interval


def _text(cell: float | None) -> str:
    """Returns a cell as it stands in the file."""
    return "" if cell is None else f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def check_interval(seconds: float) -> None:
    """Raises UserError when the interval is too short or too long."""
    shortest, longest = INTERVALS
    if not shortest <= seconds <= longest:
        raise UserError(f"--interval is {seconds:g}, but has to be {shortest:g} to {longest:g} seconds.")


@exit_codes()
def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.monitor", description=__doc__)
    parser.add_argument("--pid", type=int, required=True, help="process to sample, with all its descendants")
    parser.add_argument("--interval", type=float, default=INTERVAL, help="seconds between two samples (default 0.5)")
    parser.add_argument("--out", type=Path, default=Path("samples.csv"), help="file to write (default samples.csv)")
    args = parser.parse_args(argv)
    check_interval(args.interval)
    try:
        num_ranks = max(1, len(ProcessTree(args.pid).ranks))
        monitor = Monitor(args.pid, args.out, args.interval, num_ranks)
    except (psutil.NoSuchProcess, ValueError) as error:
        raise UserError(f"--pid {args.pid}: there is no such process.") from error
    try:
        args.out.open("w").close()
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written: {error.strerror}. Name another file.") from error
    with monitor, contextlib.suppress(KeyboardInterrupt):
        monitor.thread.join()
    cost = monitor.cost
    print(f"{cost.samples} samples in {args.out}; sampling took {100 * cost.share_of_a_core:.2f} % of a core")


if __name__ == "__main__":
    main(sys.argv[1:])
