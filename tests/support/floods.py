"""What a hostile peer sends without end, and what it costs the server."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx
import psutil

from tests.support.server import RunningServer
from tests.support.sockets import PATH, QUERY

MIB = 1024 * 1024
TAKES_NOTHING_S = 1.0
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = (
    f"GET {PATH}{QUERY}websocket HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
    f"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {KEY}\r\n\r\n"
).encode()
TEXT, CONTINUATION, PING, FINAL = 0x01, 0x00, 0x09, 0x80


def client_frame(first_byte: int, payload: bytes = b"") -> bytes:
    """A frame as a client sends it, with a mask of zeros."""
    length = len(payload)
    if length < 126:
        size = bytes([0x80 | length])
    elif length < 65536:
        size = bytes([0xFE]) + length.to_bytes(2)
    else:
        size = bytes([0xFF]) + length.to_bytes(8)
    return bytes([first_byte]) + size + bytes(4) + payload


def post(path: str, *headers: str) -> bytes:
    """The head of a POST with a chunked body."""
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Transfer-Encoding: chunked", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True)
class Flood:
    """`head` is sent on each connection, then `chunk` again and again. `in_session`: the head names
    a polling session.
    """

    head: bytes
    chunk: bytes
    in_session: bool = False


LONG_EVENT = b'42["event",1' + b",1" * 49_000 + b"]"
JOIN = client_frame(FINAL | TEXT, b"40")
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
CHUNK = b"10000\r\n" + b"y" * 65536 + b"\r\n"
REST = post("/api/things", "Content-Type: application/json")
SID = b"SESSION-ID"
POLLING = post(f"{PATH}{QUERY}polling&sid={SID.decode()}")
FLOODS = {
    "many headers": Flood(GET, b"".join(b"x%05d: %s\r\n" % (i, b"y" * 100) for i in range(500))),
    "one long header": Flood(GET + b"x: ", b"y" * 65536),
    "a long URL": Flood(b"GET /", b"y" * 65536),
    "a long URL of ours": Flood(f"GET {PATH}{QUERY}".encode(), b"y" * 65536),
    "empty lines": Flood(b"", b"\r\n" * 32768),
    "a body to polling without a session": Flood(post(f"{PATH}{QUERY}polling"), CHUNK),
    "a body to polling": Flood(POLLING, CHUNK, in_session=True),
    "a body to REST": Flood(REST, CHUNK),
    "tiny chunks to REST": Flood(REST, b"1\r\ny\r\n" * 10_000),
    "a long chunk extension": Flood(REST + b"1;", b"y" * 65536),
    "trailers": Flood(REST + b"0\r\n", b"x: y\r\n" * 10_000),
    "a long trailer": Flood(REST + b"0\r\nx: ", b"y" * 65536),
    "requests whose answers are not read": Flood(
        b"", b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000
    ),
    "tiny requests": Flood(b"", b"GET / HTTP/1.1\r\n\r\n" * 3000),
    "pings whose answers are not read": Flood(
        UPGRADE + JOIN, client_frame(FINAL | PING, b"p" * 125) * 500
    ),
    "tiny frames": Flood(UPGRADE + JOIN, client_frame(FINAL | TEXT, b"3") * 5000),
    "long events": Flood(UPGRADE + JOIN, client_frame(FINAL | TEXT, LONG_EVENT)),
    "long payloads of CONNECT": Flood(
        UPGRADE, client_frame(FINAL | TEXT, b"40/x,{" + LONG_EVENT[10:-1] + b"}")
    ),
    "fragments of a message": Flood(
        UPGRADE + client_frame(TEXT, b"4"), client_frame(CONTINUATION, b"y" * 1000) * 60
    ),
    "empty fragments": Flood(UPGRADE + client_frame(TEXT), client_frame(CONTINUATION) * 5000),
    "namespaces that do not exist": Flood(
        UPGRADE, client_frame(FINAL | TEXT, b"40/" + b"n" * 60_000 + b",")
    ),
    "frames after a second request": Flood(
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + UPGRADE,
        client_frame(FINAL | PING, b"p" * 125) * 500,
    ),
}


class Watch:
    """Samples the memory of a server, and how long its health check takes."""

    def __init__(self, server: RunningServer) -> None:
        self._process = psutil.Process(server.pid)
        self._url = server.url
        self._looked, self._over = threading.Event(), threading.Event()
        self._before_bytes = self._peak_bytes = self._process.memory_info().rss
        self.slowest_s = 0.0

    @property
    def grown_mib(self) -> float:
        """By how much the memory has grown, at most."""
        return (self._peak_bytes - self._before_bytes) / MIB

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def _look(self) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as http:
            last = False
            while not last:
                last = self._over.is_set()
                began, cpu = time.monotonic(), self._cpu_s()
                assert http.get("/healthz", headers={"Connection": "close"}).status_code == 200
                # On a busy machine everybody waits; the server is to blame for what it worked.
                waited = min(time.monotonic() - began, self._cpu_s() - cpu)
                self.slowest_s = max(self.slowest_s, waited)
                self._peak_bytes = max(self._peak_bytes, self._process.memory_info().rss)
                self._looked.set()
                time.sleep(0.01)

    @contextmanager
    def looking(self) -> Iterator["Watch"]:
        """Watch in another thread, from a first look before to a last one after."""
        failures: list[Exception] = []

        def look() -> None:
            try:
                self._look()
            except Exception as error:
                failures.append(error)
                self._looked.set()

        thread = threading.Thread(target=look)
        thread.start()
        self._looked.wait()
        try:
            yield self
        finally:
            self._over.set()
            thread.join()
        assert failures == []


def send(server: RunningServer, flood: Flood, amount: int) -> int:
    """Send a flood until `amount` bytes are gone, on new connections when one is closed, or until
    the server takes no more of them. Nothing is read. Return how many bytes were sent.
    """
    sent = 0
    with ExitStack() as stack:
        while sent < amount:
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), 10))
            peer.settimeout(TAKES_NOTHING_S)
            head = flood.head
            if flood.in_session:
                head = head.replace(SID, session_of(server).encode())
            try:
                peer.sendall(head)
                while sent < amount:
                    sent += peer.send(flood.chunk)
            except TimeoutError:
                return sent
            except OSError:
                continue
    return sent


def session_of(server: RunningServer) -> str:
    """Open a polling session."""
    opening = httpx.get(f"{server.url}{PATH}{QUERY}polling").text
    sid: str = json.loads(opening[1:])["sid"]
    return sid
