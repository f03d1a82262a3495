"""Serves a page about a run that trains, on the loopback address only."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from data.errors import UserError
from eval.reporting.following import Follower
from eval.reporting.render import policy, render, script_of
from loop.guard.process import Stopped

HOST = "127.0.0.1"


def watch_page(folder: Path) -> str:
    """Returns the page, whose script asks the server for what is new every two seconds."""
    script = script_of("charts.js", "watch.js")
    name = folder.resolve().name
    return render("watch.html.jinja", name=name, script=script, policy=policy(script, connections="'self'"))


def make_server(folder: Path, port: int) -> ThreadingHTTPServer:
    """Makes the server; port 0 takes any free port. Raises UserError for a port that cannot be used."""
    follower, lock = Follower(folder), threading.Lock()
    page = watch_page(folder).encode("utf-8", errors="replace")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (HOST, "localhost"):  # a page from elsewhere whose name leads to this address
                return self.send_error(403)
            where = urlsplit(self.path)
            if where.path == "/":
                return self._answer("text/html; charset=utf-8", page)
            if where.path != "/metrics":
                return self.send_error(404)
            asked = {key: values[-1] for key, values in parse_qs(where.query).items()}
            since, generation = (_integer(asked.get(key)) for key in ("since", "generation"))
            with lock:
                follower.poll()
                told = follower.told(max(0, since or 0), generation)
            self._answer("application/json", json.dumps(told, ensure_ascii=True).encode())

        def _answer(self, kind: str, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Prints nothing: a request every two seconds is no news."""

    try:
        server = ThreadingHTTPServer((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port} cannot be used: {error}. Give another one, or 0 for any free port.") from error
    server.daemon_threads = True
    return server


def _integer(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:
        return None


def watch(folder: Path, port: int) -> None:
    """Serves the page until the command is stopped. Raises UserError for a port that cannot be used, and Stopped."""
    server = make_server(folder, port)
    with server, stoppable():
        print(f"watching {folder}: http://{HOST}:{server.server_port}/ (Ctrl-C ends it, the run goes on)", flush=True)
        server.serve_forever()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises Stopped at SIGINT and SIGTERM."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number, "\nstopped watching; the run goes on")

    before = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
