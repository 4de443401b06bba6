"""Requests to open or continue an Engine.IO session, as values. No I/O."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl

from app.socketio.rfc6455 import KEY

VERSION = "4"
MOST_PARAMETERS = 50
RETRY_AFTER_S = 5

HEAD_END = b"\r\n\r\n"
TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
REQUEST_LINE = re.compile(rb"GET (/[!-~]*) HTTP/1\.1\r\n")
VALUE = rb"[\t -~\x80-\xff]*"
HEADER = re.compile(rb"(%s):(%s)\r\n" % (TOKEN, VALUE))
HEADERS = re.compile(rb"(?:%s:%s\r\n)*\r\n" % (TOKEN, VALUE))
# A request with one of these has a body, or expects the response to deal with the header.
NOT_PLAIN = frozenset({"content-length", "transfer-encoding", "expect", "sec-websocket-protocol"})
MOST_HEADERS = 100


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request on a Socket.IO path. Header names are in lower case."""

    method: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    scheme: str = "http"

    @property
    def sid(self) -> str | None:
        """The id of the session it belongs to; None to open one."""
        return self.query.get("sid")

    @property
    def transport(self) -> str | None:
        """`polling` or `websocket`, if the request is valid."""
        return self.query.get("transport")


class EngineError(Enum):
    """Engine.IO's reasons to refuse a request: HTTP status, code and message."""

    UNKNOWN_TRANSPORT = (400, 0, "Transport unknown")
    UNKNOWN_SESSION = (400, 1, "Session ID unknown")
    BAD_METHOD = (400, 2, "Bad handshake method")
    BAD_REQUEST = (400, 3, "Bad request")
    FOREIGN_ORIGIN = (403, 4, "Forbidden")
    UNSUPPORTED_VERSION = (400, 5, "Unsupported protocol version")
    STOPPING = (503, 6, "This node is stopping; connect again")
    TOO_MANY_SESSIONS = (503, 6, "Too many clients, see MAX_CLIENTS; try again later")


class RequestRefused(Exception):
    """The request is refused with one of Engine.IO's errors. `detail` replaces its message."""

    def __init__(self, error: EngineError, detail: str | None = None) -> None:
        self.status, code, message = error.value
        message = detail or message
        super().__init__(message)
        self.body = {"code": code, "message": message}
        self.headers = {"Cache-Control": "no-store"}
        if self.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.headers["Retry-After"] = str(RETRY_AFTER_S)

    def as_http(self) -> bytes:
        """Return the complete response, after which the connection is closed."""
        body = json.dumps(self.body, separators=(",", ":"))
        headers = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return (
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            f"{headers}Connection: close\r\n\r\n{body}"
        ).encode()


@lru_cache(maxsize=64)  # WebSocket clients all send the same
def parse_query(query: bytes) -> Mapping[str, str]:
    """Return the parameters of a query; of a repeated one, the last. Raises RequestRefused."""
    try:
        found = parse_qsl(query.decode("ascii"), True, max_num_fields=MOST_PARAMETERS)
        return MappingProxyType(dict(found))
    except ValueError:
        raise RequestRefused(EngineError.BAD_REQUEST) from None


def headers_of(raw_headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by name in lower case; the values of a repeated one are joined by commas."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in raw_headers:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


def request_of(scope: Mapping[str, Any]) -> EngineRequest:
    """Return the request of an ASGI scope. Raises RequestRefused."""
    headers = headers_of(scope["headers"])
    scheme = {"ws": "http", "wss": "https"}.get(scope["scheme"], scope["scheme"])
    query = parse_query(scope["query_string"])
    return EngineRequest(scope.get("method", "GET"), query, headers, scheme)


def parse_upgrade(head: bytes, paths: Sequence[str]) -> EngineRequest | None:
    """Return the request in `head` if it is a plain, valid WebSocket upgrade on one of `paths`.

    Plain: the whole request and nothing after it, no header twice, no body. For anything else
    return None: the HTTP server should handle it.
    """
    line = REQUEST_LINE.match(head)
    if line is None:
        return None
    path, _, query = line[1].partition(b"?")
    if path.decode() not in paths:
        return None
    if HEADERS.fullmatch(head, line.end()) is None:
        return None
    found = HEADER.findall(head, line.end())
    headers = {
        name.decode().lower(): value.strip(b" \t").decode("latin-1") for name, value in found
    }
    if len(found) > MOST_HEADERS or len(headers) < len(found):
        return None
    if not NOT_PLAIN.isdisjoint(headers) or not is_upgrade(headers):
        return None
    try:
        return EngineRequest("GET", parse_query(query), headers)
    except RequestRefused:
        return None


def upgrade_of(
    method: str, version: str, target: bytes, raw_headers: Iterable[tuple[bytes, bytes]]
) -> EngineRequest | None:
    """Return the request that an HTTP parser has read if it is a valid upgrade, plain or not."""
    headers = headers_of(raw_headers)
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    if method != "GET" or version != "1.1" or has_body or not is_upgrade(headers):
        return None
    try:
        return EngineRequest("GET", parse_query(target.partition(b"?")[2]), headers)
    except RequestRefused:
        return None


def is_upgrade(headers: Mapping[str, str]) -> bool:
    """Return whether headers ask for a WebSocket as RFC 6455, section 4.2.1, requires."""
    connection = [token.strip() for token in headers.get("connection", "").lower().split(",")]
    return (
        "host" in headers
        and "upgrade" in connection
        and headers.get("upgrade", "").lower() == "websocket"
        and headers.get("sec-websocket-version") == "13"
        and KEY.fullmatch(headers.get("sec-websocket-key", "")) is not None
    )
