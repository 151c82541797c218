"""An HTTP proxy that damages, delays, or refuses the answers of an object store."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["reset", "cut", "short", "flip", "503", "403", "expired", "500", "hang", "etag"]
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
EXPIRED = b"<?xml version='1.0'?><Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
ERRORS = {
    "503": (503, SLOW_DOWN),
    "500": (500, b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>again</Message></Error>"),
    "expired": (400, EXPIRED),
    "403": (403, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"),
}


@dataclass(frozen=True)
class Request:
    """A request that arrived. `start` is the start of its range, or -1; `sent` counts the bytes of the body that were sent."""

    method: str
    path: str
    start: int
    sent: int
    fault: str = ""


class FaultyProxy:
    """Forwards requests to `target`. `fault(method, path, start)` returns what goes wrong with an answer.

    reset: half of the body, then a reset of the connection. cut: half of the body, then its end. short: half of the body, with
    a matching length. flip: a wrong byte. hang: no answer until `released` is set. etag: another ETag. Numbers: that status.
    """

    fault: Callable[[str, str, int], Fault | None]

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.released = threading.Event()
        self.port = 0
        self.reset(latency=0)
        self._start()

    def reset(self, latency: float) -> None:
        """Removes faults, empties the log, and sets the seconds before each answer."""
        self.released.set()
        self.latency, self.released = latency, threading.Event()
        self.fault = lambda method, path, start: None
        self.requests: list[Request] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def bytes_of(self, name: str) -> list[tuple[int, int]]:
        """Returns start and length of each range of an object that was sent without a fault."""
        return [(r.start, r.sent) for r in self.requests if r.method == "GET" and r.path.endswith(name) and not r.fault]

    def go_away(self) -> None:
        """Stops listening until `come_back`. Open connections are closed at their next request."""
        self._server.proxy = None
        self._server.shutdown()
        self._server.server_close()

    def come_back(self) -> None:
        self._start()

    def _start(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.proxy = self
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "FaultyProxy":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.released.set()
        self.go_away()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    proxy: FaultyProxy | None = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        proxy = self.server.proxy
        if proxy is None:
            self._reset()
            return
        time.sleep(proxy.latency)
        ranges = self.headers.get("Range", "")
        start = int(ranges.removeprefix("bytes=").split("-")[0]) if ranges else -1
        fault = proxy.fault(self.command, self.path, start)
        if fault == "hang":
            proxy.requests.append(Request(self.command, self.path, start, 0, fault))
            proxy.released.wait()
            self._reset()
            return
        connection = http.client.HTTPConnection(proxy.target.netloc)
        length = int(self.headers.get("Content-Length", 0))
        connection.request(self.command, self.path, self.rfile.read(length) if length else None, dict(self.headers))
        response = connection.getresponse()
        body, status, headers = response.read(), response.status, dict(response.getheaders())
        connection.close()
        self._answer(proxy, fault, start, status, headers, body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _answer(
        self, proxy: FaultyProxy, fault: Fault | None, start: int, status: int, headers: dict[str, str], body: bytes
    ) -> None:
        if fault in ERRORS:
            (status, body), headers = ERRORS[fault], {"Content-Type": "application/xml"}
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "flip":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "etag":
            headers["ETag"] = '"0123456789abcdef0123456789abcdef"'
        sent = body[: len(body) // 2] if fault in ("reset", "cut") else body
        # Before the answer, after which a test may reset the log.
        proxy.requests.append(Request(self.command, self.path, start, len(sent), fault or ""))
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" and fault not in ERRORS else str(len(body))
        for name, value in {**headers, "Content-Length": length}.items():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if fault in ("reset", "cut"):
            self.close_connection = True
            if fault == "reset":
                self._reset()

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (OSError, ValueError):  # the client has gone, or the connection was closed above
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True
