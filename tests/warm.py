"""Python commands in processes that need not import torch and its company: forked by tests/warm_server.py.

A command runs cold, by executing Python as a user does, where it would not be the same warm: where the environment has
what Python or a library reads when it is loaded, and on a machine with a GPU, because CUDA does not survive a fork.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from eval.comparing.launch import clean_environment as without_launcher

SERVER = Path(__file__).with_name("warm_server.py")
READ_WHEN_LOADED = ("MALLOC_", "OMP_", "MKL_", "LD_", "PYTHON", "HF_", "TRANSFORMERS_", "HOME", "DS_ACCELERATOR")
START_UP = 600.0  # seconds that the server may take for its imports, and for extensions that are not built yet


def clean_environment() -> dict[str, str]:
    """Our environment without what a launcher would have set, one thread a process, and no warnings."""
    kept = {key: value for key, value in without_launcher().items() if not key.startswith("SWANLAB_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets, between which each message arrives whole."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Process:
    """A warm process, with what tests use of subprocess.Popen."""

    def __init__(self, words: Sequence[str], cwd: Path, env: Mapping[str, str], output: Path) -> None:
        request = {"words": list(words), "cwd": str(cwd), "env": dict(env), "output": str(output)}
        self.reply, theirs = pair()
        with theirs:
            socket.send_fds(server(), [json.dumps(request).encode()], [theirs.fileno()])
        self.pid = int(self.reply.recv(100))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.reply.settimeout(max(timeout, 0.001) if timeout is not None else None)
            try:
                said = self.reply.recv(100)
            except TimeoutError as error:
                raise subprocess.TimeoutExpired("a warm process", timeout or 0.0) from error
            self.returncode = int(said or -signal.SIGKILL)  # the supervisor is gone
            self.reply.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Started = Process | subprocess.Popen[bytes]


def fixed(env: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that has to be the server's own."""
    return {key: value for key, value in env.items() if key.startswith(READ_WHEN_LOADED)}


def can_be_warm(command: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether `command` is this Python's, in an environment of the server's kind, on a machine without a GPU."""
    return command[0] == sys.executable and fixed(env) == fixed(clean_environment()) and not torch.cuda.is_available()


def popen(command: Sequence[str], cwd: Path, env: Mapping[str, str], output: Path) -> Started:
    """Starts `command` with its output, both streams, appended to the file `output`; warm where it can be."""
    if can_be_warm(command, env):
        return Process(command[1:], cwd, env, output)
    return cold_popen(command, cwd, env, output)


def cold_popen(command: Sequence[str], cwd: Path, env: Mapping[str, str], output: Path) -> "subprocess.Popen[bytes]":
    """The same by executing the command."""
    with output.open("ab") as out:
        return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


@cache
def server() -> socket.socket:
    """The channel to this process's own server, which ends when the channel does."""
    ours, theirs = pair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, str(SERVER), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
        )
    ours.settimeout(START_UP)
    threads = ours.recv(100)
    assert threads == b"1", f"the fork server has {threads!r} threads, and forking keeps only one"
    ours.settimeout(None)
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours
