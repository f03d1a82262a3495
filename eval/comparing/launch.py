"""Runs a command as a user would, with a time limit; says why it failed; leaves none of its processes behind."""

import contextlib
import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

AS_TYPED = ("accelerate.commands.accelerate_cli", "launch")  # the shell command `accelerate launch` runs this module
LAUNCHER_VARIABLES = (
    "ACCELERATE_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"
)  # fmt: skip
# The environment variable of all processes of a configuration: its folder, and what each command has for itself.
MARK = "PLAINLOOP_STAGE"
SEPARATOR = "#"  # in a mark: before it the configuration's folder, behind it what one command alone has
GRACE = 10.0  # seconds from SIGTERM to SIGKILL
GUARD = "import sys; from eval.comparing.launch import end_processes; sys.stdin.read(); end_processes(sys.argv[1])"
LOG_TAIL = 2_000_000  # bytes at the end of a log that are searched for the reason of a failure
OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|DefaultCPUAllocator: can't allocate|std::bad_alloc|Cannot allocate memory|^MemoryError"
)
SIGNAL_9 = re.compile(r"exitcode\s*: -9\b|Signals\.SIGKILL|\(SIGKILL\)")
GONE = re.compile(r"^error: .*\bdied\b")  # a rank says this when another rank has ended
EXCEPTION = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)")
OF_LAUNCHERS = ("ChildFailedError", "CalledProcessError")  # launchers say only that a rank has failed, not why


def clean_environment() -> dict[str, str]:
    """Returns the environment of this process without the variables that a launcher would have set."""
    return {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER_VARIABLES)}


def accelerate_command(config: str | Path, launcher: Sequence[str] = AS_TYPED) -> list[str]:
    """Returns the command that launches with the accelerate YAML `config` at a free port; a script has to follow it.

    `launcher` is the module that Python runs, with the arguments that come first.
    """
    return [sys.executable, "-m", *launcher, "--config_file", str(config), "--main_process_port", "0"]


def run_command(
    command: Sequence[str], log: Path, mark: str, timeout: float, meanwhile: Callable[[int], None]
) -> int | None:
    """Runs `command` and appends its output to `log`.

    Returns the exit code of the command, or None when the command took longer than `timeout` seconds. Calls `meanwhile`
    with the process id of the command, at once and then about twice a second. When this function returns or raises, all
    processes of the command are ended.
    """
    deadline = time.monotonic() + timeout
    mark = f"{mark}{SEPARATOR}{uuid.uuid4()}"  # so that the guard of a command ends none that begins after it
    with guarded(mark), log.open("ab") as out:
        process = subprocess.Popen(
            command,
            env=clean_environment() | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,  # a Ctrl-C in the terminal is for this process, not for the command
        )
        while time.monotonic() < deadline:
            meanwhile(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.5)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the kernel does not end
        process.wait(timeout=GRACE)
    return None


@contextmanager
def guarded(mark: str) -> Iterator[None]:
    """Ends all processes with this mark when the context is left, and also when this process is killed inside it.

    Another process, the guard, does this: the guard waits for the end of its standard input. A process group would not
    be enough, because a launcher starts each rank in a session of its own.
    """
    command = [sys.executable, "-c", GUARD, mark]
    guard = subprocess.Popen(command, env=clean_environment(), stdin=subprocess.PIPE, start_new_session=True)
    assert guard.stdin is not None
    try:
        yield
    finally:
        guard.stdin.close()
        guard.wait()


def end_processes(mark: str) -> None:
    """Sends SIGTERM to all processes with this mark, and SIGKILL to the processes that do not end after it."""
    marked = _marked(mark)
    for process in marked:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _wait_for_their_end(marked, mark, GRACE)
    for _ in range(10):  # a process may have started another one in the meantime
        left = _marked(mark)
        if not left:
            return
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _wait_for_their_end(left, mark, 1.0)


def _wait_for_their_end(processes: Sequence[psutil.Process], mark: str, seconds: float) -> None:
    """Waits at most `seconds` for `processes` and for those that have this mark.

    A process that ends loses its mark a moment before it has ended. One that has ended counts as gone, also while its
    parent has not asked for it: the parent may be waiting for us.
    """
    deadline = time.monotonic() + seconds
    while (any(map(_runs, processes)) or _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _marked(mark: str) -> list[psutil.Process]:
    """Returns the processes that have this mark in their environment.

    `mark` is the mark of one command, or only its first part, which the commands of a configuration share.
    """
    marked = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            found = process.environ().get(MARK, "")
            if mark in (found, found.partition(SEPARATOR)[0]):
                marked.append(process)
    return marked


def read_from(log: Path, offset: int) -> str:
    """Returns what a log has after its first `offset` bytes, but at most its last two megabytes."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - LOG_TAIL))
        return file.read().decode("utf-8", errors="replace")


def failure_reason(said: str, code: int) -> str:
    """Returns one line: the reason why a command failed that printed `said` and ended with `code`."""
    lines = said.splitlines()
    if full := next((line for line in lines if OUT_OF_MEMORY.search(line)), None):
        return f"out of memory: {_short(full)}"
    errors = [line for line in lines if line.startswith("error:")]
    if (code == -9 or SIGNAL_9.search(said)) and all(map(GONE.search, errors)):
        return "killed (signal 9), as the kernel does when memory runs out"
    if errors:
        return _short(errors[-1].removeprefix("error:"))
    exceptions = [found[1] for line in lines if (found := EXCEPTION.match(line))]
    own = [text for text in exceptions if not any(name in text for name in OF_LAUNCHERS)]
    return _short(own[-1]) if own else f"exit code {code}"


def _short(line: str) -> str:
    """Returns at most 300 characters of `line`, with single spaces."""
    line = " ".join(line.split())
    return line if len(line) <= 300 else f"{line[:299]}…"
