"""A server in front of MLflow's that lets some requests go wrong."""

from __future__ import annotations

import http.client
import http.server
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.mlflow_server import Server

MODES = ("down", "slow", "failing", "lost", "read-only", "locked", "restarted")
HOP_BY_HOP = ("host", "connection", "transfer-encoding", "content-length")
SLOW_SECONDS = 2.0
LOCKED_SECONDS = 3.0
Fault = Callable[[str, str], str | None]
"""From method and path of a request to what goes wrong with it."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def _pass_on(self) -> None:
        body = self._body()
        mode = self.server.fault(self.command, self.path)
        writes = self.command != "GET" and "/search" not in self.path
        if mode == "down":
            self._hang_up()
            return
        if mode == "slow":
            time.sleep(SLOW_SECONDS)
        if mode == "failing" or (mode == "read-only" and writes):
            self._answer(503 if mode == "failing" else 500, b"attempt to write a readonly database")
            return
        if mode == "restarted":
            with self.server.one_at_a_time:
                self.server.behind.kill()
                self.server.behind.start()
        locked = None
        if mode == "locked":
            locked = sqlite3.connect(self.server.behind.database, check_same_thread=False)
            locked.execute("BEGIN EXCLUSIVE")
            threading.Timer(LOCKED_SECONDS, locked.close).start()
        try:
            status, content, kind = self._behind(body)
        except OSError:
            self._hang_up()
            return
        if mode == "lost":
            self._hang_up()
        else:
            self._answer(status, content, kind)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _pass_on  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _behind(self, body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in HOP_BY_HOP}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.getheader("Content-Type", "text/plain")

    def _answer(self, status: int, content: bytes, kind: str = "text/plain") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Clients hang up; that is what this is about."""


@contextmanager
def in_front_of(behind: Server, fault: Fault) -> Iterator[str]:
    """Address of the proxy."""
    server: Any = _Threads(("127.0.0.1", 0), _Handler)
    server.behind, server.fault, server.one_at_a_time = behind, fault, threading.Lock()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
