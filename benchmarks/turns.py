"""Lets contenders take turns on one machine: each lives in a process of its own and works only when it is its turn.

So whatever else the machine does slows all contenders alike, and figures of one call can be compared.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from benchmarks.docs_section import write_section
from loop.recipe import ROOT

ADDRESS = "PLAINLOOP_TURNS"  # environment variable: the socket at which a contender waits for its turns
START = 600.0  # a contender has to be ready within these seconds


@dataclass
class Measured:
    """Holds what one contender took and said, without its first turn."""

    seconds: list[float] = field(default_factory=list)  # one number for each turn
    notes: dict[str, Any] = field(default_factory=dict)  # what the contender said after its last turn

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Turns:
    """Makes a contender wait for its turns. The contender calls `before_step` and `after_step` around each step."""

    def __init__(self, steps: int) -> None:
        self.connection = Client(os.environ[ADDRESS], family="AF_UNIX")
        self.steps, self.left, self.begun, self.joules = steps, 0, 0.0, 0.0
        self.notes: dict[str, Any] = {}

    def before_step(self) -> None:
        """Before the first step of a turn, waits for the turn; after the last turn, ends the process.

        Before it waits it sends how long the previous turn took, with everything that came after that turn's last step.
        """
        if self.left == 0:
            if self.begun:
                self.connection.send((time.perf_counter() - self.begun, self.notes))
            if self.connection.recv() == "stop":
                sys.stdout.flush()
                os._exit(0)
            self.begun, self.left, self.joules = time.perf_counter(), self.steps, joules_of_gpu()

    def after_step(self, **notes: Any) -> None:
        """Counts the step; `notes` is what the contender says when the turn is over."""
        self.left, self.notes = self.left - 1, notes
        if self.left == 0 and (joules := joules_of_gpu() - self.joules):
            self.notes["joules"] = joules


def joules_of_gpu() -> float:
    """Returns the energy that the first GPU has taken since its driver was loaded, where NVML (package nvidia-ml-py)
    tells it, and 0 elsewhere."""
    try:
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(nvml.nvmlDeviceGetHandleByIndex(0))) / 1000
    except Exception:  # no package, no GPU, or a driver that does not count
        return 0.0


def take_turns(
    commands: Mapping[str, Sequence[str]], rounds: int, threads: int, ranks: Mapping[str, int] | None = None
) -> dict[str, Measured]:
    """Starts all `commands`, gives each `rounds` turns after a first one that does not count, and returns the seconds.

    `ranks` says how many processes of a command take turns, where it is more than one; the slowest of them counts.
    Raises SystemExit, with what a contender wrote, when that contender does not start or ends too early.
    """
    measured = {name: Measured() for name in commands}
    with tempfile.TemporaryDirectory() as folder:
        connections: dict[str, list[Connection]] = {}
        processes = []
        try:
            for number, (name, command) in enumerate(commands.items()):
                address = f"{folder}/{number}"
                with Listener(address, family="AF_UNIX", backlog=8) as listener:
                    environment = {**os.environ, ADDRESS: address, "OMP_NUM_THREADS": str(threads), "TMPDIR": folder}
                    log = Path(folder, f"{number}.log")
                    with log.open("w") as out:
                        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=out)
                    processes.append(process)
                    many = (ranks or {}).get(name, 1)
                    connections[name] = [_accept(listener, process, name, log) for _ in range(many)]
            for turn in range(rounds + 1):
                for name, of_ranks in connections.items():
                    try:
                        for connection in of_ranks:
                            connection.send("go")
                        said = [connection.recv() for connection in of_ranks]
                    except (ConnectionError, EOFError):
                        log = Path(folder, f"{list(commands).index(name)}.log")
                        raise SystemExit(f"{name} ended:\n{log.read_text()[-4000:]}") from None
                    seconds = max(seconds for seconds, _ in said)
                    measured[name].notes = said[0][1]
                    if turn:
                        measured[name].seconds.append(seconds)
                    print(f"{turn}/{rounds} {name}: {seconds:.2f} s", file=sys.stderr, flush=True)
            for of_ranks in connections.values():
                for connection in of_ranks:
                    connection.send("stop")
        finally:
            for process in processes:
                process.terminate()
                process.wait()
    return measured


def _accept(listener: Listener, process: subprocess.Popen[bytes], name: str, log: Path) -> Connection:
    """Waits until a process of the contender `name` connects; raises SystemExit when the contender ends before."""
    listener._listener._socket.settimeout(1.0)  # type: ignore[attr-defined]
    begun = time.monotonic()
    while time.monotonic() - begun < START:
        try:
            return listener.accept()
        except TimeoutError:
            if process.poll() is not None:
                break
    raise SystemExit(f"{name} did not start:\n{log.read_text()[-4000:]}")


def write_results(name: str, title: str, results: dict[str, Any], text: str) -> None:
    """Writes `results` to benchmarks/results/<name>.json, and `text` as a section of docs/performance.md."""
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    write_section(title, f"python -m benchmarks.{name}", text, "performance.md")


def spread(values: Sequence[float]) -> str:
    """Formats the median and the range of `values`, as "16.2 (15.9 to 16.4)" or "6,710 (6,030 to 7,840)"."""
    median, least, most = (
        f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
        for value in (statistics.median(values), min(values), max(values))
    )
    return f"{median} ({least} to {most})"
