"""Lets one process of a machine do what all of its processes need, and gives the others the result.

The process of local rank 0 opens a socket before it starts, and the others wait at it. So nothing waits in a
collective, nothing is written to a place that a killed run would leave behind, and the others see it at once when that
process dies.
"""

import array
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from itertools import count
from typing import Any

from data.errors import UserError
from loop.guard.process import RunError

SECONDS = 600.0  # for all processes of a machine to come to this place
PAUSE = 0.05  # seconds between two tries to reach the process of local rank 0
MOST_FDS = 16  # descriptors that travel at most
CALLS = count()

Result = tuple[dict[str, Any], list[int]]  # what can be written as JSON, and open descriptors of files


def once_per_machine(make: Callable[[], Result]) -> Result:
    """Returns what `make` returns in the process of local rank 0; every process of the machine calls this function.

    Raises the UserError that `make` raises there in every process, and RunError where that process is lost.
    """
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 or sys.platform != "linux":
        return make()
    where = (os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", ""), rank - local)
    # An abstract address, which is no file. Two launches on a machine have different ports, and two launches that stand
    # for two machines different first ranks. All processes make the same calls in the same order.
    address = f"\0plainloop-{os.getuid()}-{'-'.join(map(str, where))}-{next(CALLS)}"
    return _serve(address, processes - 1, make) if local == 0 else _ask(address)


def _serve(address: str, others: int, make: Callable[[], Result]) -> Result:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen(others)
        server.settimeout(SECONDS)
        error: Exception | None = None
        said: dict[str, Any] = {}
        fds: list[int] = []
        try:
            said, fds = make()
        except Exception as raised:
            error = raised
            said = {"mistake" if isinstance(raised, UserError) else "failure": str(raised)}
        message = json.dumps(said).encode()
        for _ in range(others):
            try:
                connection, _ = server.accept()
            except TimeoutError:
                raise RunError(f"a process of this machine did not come for the rows within {SECONDS:.0f} s") from error
            with connection:
                connection.settimeout(SECONDS)
                head = len(message).to_bytes(8, "big")
                socket.send_fds(connection, [head], fds)
                connection.sendall(message)
    if error is not None:
        raise error
    return said, fds


def _ask(address: str) -> Result:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        _connect(connection, address)
        message = bytearray()
        try:
            head, fds, _, _ = socket.recv_fds(connection, 8, MOST_FDS)
            size = int.from_bytes(head, "big") if len(head) == 8 else 1
            while len(message) < size:
                if not (part := connection.recv(min(2**20, size - len(message)))):
                    raise ConnectionResetError
                message += part
        except ConnectionResetError:
            raise RunError("the process that reads the rows of this machine has ended; its message says why") from None
    said: dict[str, Any] = json.loads(message)
    if "mistake" in said:
        raise UserError(said["mistake"])
    if "failure" in said:
        raise RunError(f"the process that reads the rows of this machine has failed: {said['failure']}")
    return said, list(fds)


def _connect(connection: socket.socket, address: str) -> None:
    """Waits until the process of local rank 0 listens; one of another user is not believed."""
    end = time.monotonic() + SECONDS
    while True:
        try:
            connection.connect(address)
            break
        except (ConnectionRefusedError, FileNotFoundError):
            if time.monotonic() > end:
                raise RunError(f"local rank 0 of this machine did not read the rows within {SECONDS:.0f} s") from None
            time.sleep(PAUSE)
    peer = array.array("i")
    peer.frombytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 3 * peer.itemsize))
    if peer[1] != os.getuid():
        raise RunError("another user's process answers in the place of local rank 0; launch with another port")
