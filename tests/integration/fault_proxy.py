"""A proxy in front of an S3 server that answers as a failing one does, for as many requests as it is told.

    with FaultProxy(s3.endpoint) as proxy:
        proxy.do(Fault("503", "PUT", "/dvc/", count=3))
        ...                                    # clients use proxy.endpoint
        proxy.lift()

Requests pass through as they are, signature and Host header included, so that clients sign for the proxy's address.
"""

import contextlib
import http.client
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal, Self
from urllib.parse import urlsplit

__all__ = ["Fault", "FaultProxy"]

Kind = Literal["503", "slow", "reset", "lost answer", "cut", "short"]
SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ServiceUnavailable</Code><Message>Reduce your request rate.</Message></Error>'
)
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "expect"}


@dataclass
class Fault:
    """What happens to requests of a method whose path, query included, a pattern is found in."""

    kind: Kind
    """`503`: refused before it reaches the server. `slow`: answered after `seconds`. `reset`: the connection is reset with half of the
    request read (an upload) or half of the answer sent (a download). `lost answer`: the server does it, and the connection is reset in
    place of the answer. `cut`: half of the body under the whole body's Content-Length, then the end of the connection. `short`: half of
    the body, and a Content-Length that fits it."""
    method: str
    """Such as `PUT`; a pattern too."""
    path: str
    count: int | None = None
    """Requests that it meets; None: all until it is lifted."""
    skip: int = 0
    """Requests that pass before the first that it meets."""
    seconds: float = 0.0
    met: int = 0
    """Requests that it has met."""


class FaultProxy:
    """Listens on a loopback port from its start as a context manager to its end."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self._upstream = (str(parts.hostname), int(parts.port or 80))
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        """Method and path of every request since the last `lift`."""

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.lift()
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def do(self, *faults: Fault) -> None:
        """From now on these, beside those that are there; of several that fit a request the first is done."""
        with self._lock:
            self._faults += faults

    def lift(self) -> None:
        """Every request passes from now on."""
        with self._lock:
            self._faults.clear()
            self.requests.clear()

    @contextlib.contextmanager
    def doing(self, *faults: Fault) -> Iterator[None]:
        self.do(*faults)
        try:
            yield
        finally:
            self.lift()

    def fitting(self, method: str, path: str) -> Fault | None:
        """The fault for a request, which is counted with this call."""
        with self._lock:
            self.requests.append((method, path))
            for fault in self._faults:
                if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    if fault.skip:
                        fault.skip -= 1
                    elif fault.count is None or fault.met < fault.count:
                        fault.met += 1
                        return fault
        return None

    def forwarded(self, method: str, path: str, headers: Any, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        """The server's answer. A connection a request: a reset one is never used again."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=120)
        with contextlib.closing(connection):
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            if body or method in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that went away, and connections that were reset on purpose, are no news."""


def _handler(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            self._pass(proxy.fitting(self.command, self.path))

        def _pass(self, fault: Fault | None) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            kind = fault.kind if fault else None
            if kind == "reset" and length:
                self.rfile.read(length // 2)
                self._reset()
                return
            body = self._chunks() if "chunked" in (self.headers.get("Transfer-Encoding") or "") else self.rfile.read(length)
            if kind == "503":
                self._answer(503, "Service Unavailable", [("Content-Type", "application/xml")], SLOW_DOWN)
                return
            if fault and fault.seconds:
                time.sleep(fault.seconds)
            status, reason, headers, content = proxy.forwarded(self.command, self.path, self.headers, body)
            half = content[: len(content) // 2]
            if kind == "lost answer":
                self._reset()
            elif kind == "reset":
                self._answer(status, reason, headers, half, len(content))
                self._reset()
            elif kind == "cut":
                self._answer(status, reason, headers, half, len(content))
                self.close_connection = True
            elif kind == "short":
                self._answer(status, reason, headers, half, len(half))
            else:
                self._answer(status, reason, headers, content)

        def _chunks(self) -> bytes:
            whole = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                whole += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return whole

        def _answer(self, status: int, reason: str, headers: list[tuple[str, str]], content: bytes, length: int | None = None) -> None:
            self.send_response_only(status, reason)
            told = next((value for name, value in headers if name.lower() == "content-length"), "0")
            for name, value in headers:
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            if status not in (204, 304):
                self.send_header("Content-Length", told if self.command == "HEAD" else str(len(content) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
            self.wfile.flush()

        def _reset(self) -> None:
            """Closes with RST in place of FIN: what a router or a server that dies does."""
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            # Not shutdown(), which would end it in order; both file objects hold the socket open until they are closed.
            self.wfile.close()
            self.rfile.close()
            self.connection.close()
            self.close_connection = True

    return Handler
