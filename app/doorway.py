"""What a peer can do before a handler sees it, and around one, is bounded here: how many
connections there are, how long a request may be and take, and for which host it may be.

A connection begins as an `Arrival`. With the head of its first request it becomes a Socket.IO
session, without uvicorn, or an `HttpConnection`: uvicorn's own protocol within limits. This module
and `serving` are the ones that rely on what uvicorn does not document.
"""

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, TypeAlias, cast

import httptools
import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.deadlines import Deadlines
from app.gathering import Gathering
from app.hosts import Hosts
from app.rest.problems import PROBLEM_JSON, ProblemDetails, wrong_host
from app.socketio.handshake import (
    HEAD_END,
    EngineRequest,
    RequestRefused,
    parse_upgrade,
    upgrade_of,
)

# A browser's longest request heads, cookies included, have about 8 KiB.
HEAD_BYTES = 16 * 1024
# Time for the head of a request, from the connection's start or the last response on; for a peer to
# read anything of a response; and for it to take the last answer and close.
PATIENCE_S = 10.0
# Time for the body of a request: 1 MiB at 280 kbit/s.
BODY_S = 30.0
# What requests that have not come in full may hold together. The oldest give way, because an honest
# request is complete in a moment.
UNFINISHED_BYTES = 8 * 1024 * 1024
# Requests that wait on a connection for the responses before them. No browser sends any.
MOST_PIPELINED = 16
# What a refused peer may still send. To close at once could take its answer away from it.
LINGER_BYTES = 4 * 1024 * 1024
# Connections beyond MAX_CLIENTS, so that health checks, REST and refusals still have a way in.
MOST_EXTRA, LEAST_EXTRA, EXTRA_SHARE = 256, 16, 1 / 8
FULL_RETRY_S = 5


def extra_connections(max_clients: int) -> int:
    """How many connections beyond this number are accepted."""
    return min(MOST_EXTRA, max(LEAST_EXTRA, int(max_clients * EXTRA_SHARE)))


def answer_of(status: HTTPStatus, detail: str, *headers: str) -> bytes:
    """A whole response with problem+json, after which the connection is closed."""
    body = msgspec.json.encode(
        ProblemDetails(title=status.phrase, status=status.value, detail=detail)
    )
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {PROBLEM_JSON}",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *headers,
    ]
    return "\r\n".join(lines).encode() + HEAD_END + body


TOO_LONG = answer_of(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"Send at most {HEAD_BYTES} bytes of URL and headers.",
)
TOO_SLOW = answer_of(
    HTTPStatus.REQUEST_TIMEOUT,
    f"Send the headers of a request within {PATIENCE_S:g} seconds, its body within {BODY_S:g}.",
)
FULL = answer_of(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "This server has as many clients as MAX_CLIENTS allows; try again later.",
    f"Retry-After: {FULL_RETRY_S}",
)
BUSY = answer_of(
    HTTPStatus.SERVICE_UNAVAILABLE,
    "Too many requests are being sent at once; try again later.",
    f"Retry-After: {FULL_RETRY_S}",
)
NOT_HTTP = answer_of(HTTPStatus.BAD_REQUEST, "Send a request in HTTP/1.1.")
NO_WEBSOCKET = answer_of(HTTPStatus.NOT_FOUND, "There is no WebSocket at this URL.")
NOT_AN_UPGRADE = answer_of(
    HTTPStatus.BAD_REQUEST, "Open a WebSocket as RFC 6455 says: GET, a key, version 13, no body."
)


class Doorway:
    """What all connections share: their number, their deadlines, the hosts they may name.

    Called by uvicorn to make the protocol of a new connection. `max_clients`: how many connections
    are served; some more are accepted, but no client among them. `paths`: those of Socket.IO.
    """

    def __init__(self, hosts: Hosts, max_clients: int, paths: Sequence[str]) -> None:
        self.paths = paths
        self.openings = tuple(f"GET {path}".encode() for path in paths)  # of upgrades
        self._hosts = hosts
        self._max_clients = max_clients
        self._most_extra = extra_connections(max_clients)
        self._extra: dict[asyncio.Transport, None] = {}  # the oldest first
        self._unfinished: dict[Arrival | HttpConnection, int] = {}  # the oldest first
        self._unfinished_bytes = 0
        self.waiting: Deadlines[Guest] = Deadlines(PATIENCE_S, lambda guest: guest.overdue())
        self.bodies: Deadlines[HttpConnection] = Deadlines(
            BODY_S, lambda connection: connection.body_overdue()
        )

    def __call__(self, **arguments: Any) -> "Arrival":
        return Arrival(self, arguments)

    def enter(self, transport: asyncio.Transport, arguments: dict[str, Any]) -> None:
        """Take in a new connection. When there are too many, the one that has been among them for
        longest makes room: whoever has a request to make has made it by then.
        """
        sessions = arguments["app_state"]["socketio"].connections
        if len(arguments["server_state"].connections) + sessions <= self._max_clients:
            return
        if len(self._extra) >= self._most_extra:
            oldest = next(iter(self._extra))
            del self._extra[oldest]
            protocol = oldest.get_protocol()
            if isinstance(protocol, Arrival | HttpConnection):
                protocol.turn_away(FULL)
            else:
                oldest.abort()
        self._extra[transport] = None

    def hold(self, guest: "Arrival | HttpConnection", more_bytes: int) -> None:
        """Count bytes of a request that has not come in full; refuse the oldest if it is too much.

        The guest itself may be the oldest.
        """
        self._unfinished[guest] = self._unfinished.get(guest, 0) + more_bytes
        self._unfinished_bytes += more_bytes
        while self._unfinished_bytes > UNFINISHED_BYTES:
            oldest = next(iter(self._unfinished))
            self.release(oldest)
            oldest.turn_away(BUSY)

    def release(self, guest: "Arrival | HttpConnection") -> None:
        """The request of a guest has come in full, or never will."""
        self._unfinished_bytes -= self._unfinished.pop(guest, 0)

    def is_extra(self, transport: asyncio.Transport) -> bool:
        """Whether a connection is one too many for a client."""
        return transport in self._extra

    def leave(self, transport: asyncio.Transport) -> None:
        """Forget a connection."""
        self._extra.pop(transport, None)

    def upgrade(
        self,
        transport: asyncio.Transport,
        arguments: dict[str, Any],
        request: EngineRequest,
        early: bytes,
    ) -> None:
        """Make a connection a session. `early`: what the client sent without waiting for that."""
        host = request.headers.get("host")
        if self.is_extra(transport):
            Parting(self, transport, arguments, FULL)
        elif not self._hosts.allow(host):
            Parting(self, transport, arguments, answer_of(*wrong_host(host)))
        else:
            try:
                arguments["app_state"]["socketio"].accept(transport, request)
            except RequestRefused as refused:
                Parting(self, transport, arguments, refused.as_http())
            else:
                if early:
                    cast(asyncio.Protocol, transport.get_protocol()).data_received(early)


class Arrival(asyncio.Protocol):
    """Reads the head of a connection's first request and hands the connection to the Socket.IO
    server or to uvicorn, with every byte read so far.
    """

    __slots__ = ("_arguments", "_door", "_head", "transport")

    def __init__(self, door: Doorway, arguments: dict[str, Any]) -> None:
        self._door = door
        self._arguments = arguments  # what uvicorn makes its own protocol with
        self._head: bytearray | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._arguments["server_state"].connections.add(self)
        self._door.waiting.add(self)
        self._door.enter(self.transport, self._arguments)

    def data_received(self, data: bytes) -> None:
        head: bytes | bytearray = data
        seen = 0
        if self._head is not None:
            seen = len(self._head)
            self._head += data
            head = self._head
        if not self._could_be_an_opening(head):
            self._pass_on(head)
            return
        end = head.find(HEAD_END, max(0, seen - len(HEAD_END) + 1))
        length = len(head) if end < 0 else end + len(HEAD_END)
        if length > HEAD_BYTES:
            self.refuse(TOO_LONG)
        elif end >= 0:
            self._open(bytes(head[:length]), bytes(head[length:]))
        elif head.find(b"\n\n", max(0, seen - 1)) >= 0:  # not HTTP, but there is an answer to it
            self._pass_on(head)
        else:
            if self._head is None:
                self._head = bytearray(data)
            self._door.hold(self, len(data))

    def _could_be_an_opening(self, head: bytes | bytearray) -> bool:
        """Whether the bytes so far are, or may become, a request on a Socket.IO path."""
        openings = self._door.openings
        return head.startswith(openings) or any(path.startswith(head) for path in openings)

    def _open(self, head: bytes, rest: bytes) -> None:
        request = parse_upgrade(head, self._door.paths)
        if request is None:
            self._pass_on(head + rest)
        else:
            self._leave()
            self._door.upgrade(self.transport, self._arguments, request, rest)

    def _pass_on(self, head: bytes | bytearray) -> None:
        self._leave()
        protocol = HttpConnection(self._door, self._arguments)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(bytes(head))

    def refuse(self, answer: bytes) -> None:
        """Answer a request that cannot be served, and close."""
        self._leave()
        Parting(self._door, self.transport, self._arguments, answer)

    def turn_away(self, answer: bytes) -> None:
        """There is no room to wait for the request, nor for the peer to take its answer."""
        self.transport.write(answer)
        self.transport.close()

    def overdue(self) -> None:
        """The head of the first request did not come in time."""
        if self._head is None or self.transport.is_closing():
            self.transport.abort()
        else:
            self.refuse(TOO_SLOW)

    def connection_lost(self, _: Exception | None) -> None:
        self._leave()
        self._door.leave(self.transport)

    def shutdown(self) -> None:
        """uvicorn is shutting down; no request is pending."""
        self.transport.close()

    def _leave(self) -> None:
        self._arguments["server_state"].connections.discard(self)
        self._door.waiting.remove(self)
        self._door.release(self)


class HttpConnection(HttpToolsProtocol):
    """uvicorn's protocol, fed no more than a request may have, with deadlines that share timers.

    httptools keeps the part of a header that it has seen, and copies it with every part that
    follows, so it must not be fed headers without end. It says when it has read something to the
    end; bytes from which nothing comes are counted.
    """

    def __init__(self, door: Doorway, arguments: dict[str, Any]) -> None:
        super().__init__(**arguments)
        self._door = door
        self._arguments = arguments
        self._extra = False
        self._fruitless_bytes = 0  # fed since anything came of it
        self._fruitful = False
        self._in_head = self._in_body = False
        self._deaf = False  # the answers that are due are the last
        self._refusal = NOT_HTTP
        self._unsent_bytes = 0

    # Coming in

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answers = Gathering(transport)
        self._extra = self._door.is_extra(transport)
        self._door.waiting.add(self)

    def data_received(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self._deaf:
            piece = data[at : at + HEAD_BYTES]
            at += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                at -= len(piece) - upgrade.args[0]
                if self._should_upgrade():
                    self._open_websocket(data[at:])
                    return
            except httptools.HttpParserError:
                self.refuse(self._refusal)
            else:
                self._count(len(piece))

    def _count(self, fed_bytes: int) -> None:
        if self._in_head or self._in_body:
            self._door.hold(self, fed_bytes)
        if self._deaf:
            return
        if self._fruitful:
            self._fruitful, self._fruitless_bytes = False, 0
            return
        self._fruitless_bytes += fed_bytes
        if self._fruitless_bytes > HEAD_BYTES:
            self.refuse(TOO_LONG)

    def on_message_begin(self) -> None:
        self._fruitful = self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """A request has begun. Raises ValueError, which the parser turns into its own error."""
        if self.head_bytes() > HEAD_BYTES:
            self._refusal = TOO_LONG
            raise ValueError
        if self._extra and self._is_new_client():
            self._refusal = FULL
            raise ValueError
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError
        super().on_headers_complete()
        if self.cycle is not None:
            self.cycle.transport = cast(asyncio.Transport, self._answers)
        self._fruitful, self._in_head, self._in_body = True, False, True
        self._door.waiting.remove(self)
        self._door.bodies.add(self)
        if self._extra and self.cycle is not None:
            self.cycle.keep_alive = False

    def head_bytes(self) -> int:
        """The length of the URL and headers of a request, with what separates them."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _is_new_client(self) -> bool:
        """Whether this is a client that has no session yet; others may poll and post."""
        path, _, query = self.url.partition(b"?")
        return path.decode("latin-1") in self._door.paths and b"sid=" not in query

    def on_body(self, body: bytes) -> None:
        self._fruitful = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._fruitful, self._in_body = True, False
        self._door.bodies.remove(self)
        self._door.release(self)
        super().on_message_complete()

    # Upgrades other than the first request of a connection, or in an unusual form

    def _should_upgrade_to_ws(self) -> bool:
        return True

    def _open_websocket(self, early: bytes) -> None:
        path = self.url.partition(b"?")[0].decode("latin-1")
        method = self.parser.get_method().decode()
        request = upgrade_of(method, self.parser.get_http_version(), self.url, self.headers)
        if self._answering():
            self.refuse(NOT_AN_UPGRADE)
        elif path not in self._door.paths:
            self.refuse(NO_WEBSOCKET)
        elif request is None:
            self.refuse(NOT_AN_UPGRADE)
        else:
            self._detach()
            self._door.upgrade(self.transport, self._arguments, request, early)

    # Going out

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        self._answers.flush()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `waiting` is one timer for all
        if self._answering():
            return
        if self._in_body and not self.transport.is_closing():
            self._part(b"")  # the answer did not wait for the body
        else:
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering():
            self._door.waiting.remove(self)

    def _watch(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._door.waiting.add(self)

    # The end

    def overdue(self) -> None:
        """For a while the peer has read nothing of a response, or sent no request."""
        unsent_bytes = self.transport.get_write_buffer_size()
        if 0 < unsent_bytes < self._unsent_bytes:
            self._watch()  # it reads, slowly
        elif unsent_bytes or self.transport.is_closing():
            self.transport.abort()
        elif self._in_head:
            self.refuse(TOO_SLOW)
        else:
            self.transport.close()

    def body_overdue(self) -> None:
        """The body of a request did not come in time."""
        self.refuse(TOO_SLOW)

    def refuse(self, answer: bytes) -> None:
        """Answer what cannot be a request, and close; but first the requests before it."""
        self._deaf = True
        if self._may_answer() and not self.transport.is_closing():
            self._part(answer)
        elif self._answering() and not self._in_body:
            self.cycle.keep_alive = False
        else:
            self.transport.abort()

    def turn_away(self, answer: bytes) -> None:
        """There is no room to wait for the request, nor for the peer to take its answer."""
        self._deaf = True
        if self._may_answer():
            self.transport.write(answer)
        self.transport.close()

    def _may_answer(self) -> bool:
        """Whether an answer now would be one to the request that is coming in."""
        unanswered = self._in_body and not self.cycle.response_started and not self.pipeline
        return unanswered or not self._answering()

    def _part(self, answer: bytes) -> None:
        self._detach()
        Parting(self._door, self.transport, self._arguments, answer)

    def _detach(self) -> None:
        """Give the connection away; whatever handler is left finds that its client has gone."""
        self.flow.resume_reading()
        self._answers.flush()
        self._forget()
        super().connection_lost(ConnectionAbortedError())

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._door.leave(self.transport)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """uvicorn is shutting down. A request that has not come in full is not waited for."""
        if self._in_body:
            self.transport.abort()
        else:
            super().shutdown()

    def _forget(self) -> None:
        self._door.release(self)
        self._door.waiting.remove(self)
        self._door.bodies.remove(self)


class Parting(asyncio.Protocol):
    """Gives a peer its last answer, and time to read it: closing at once resets the connection of a
    peer that still sends, and the answer may be lost.
    """

    __slots__ = ("_arguments", "_door", "_received_bytes", "transport")

    def __init__(
        self,
        door: Doorway,
        transport: asyncio.Transport,
        arguments: dict[str, Any],
        answer: bytes,
    ) -> None:
        self._door = door
        self.transport = transport
        self._arguments = arguments
        self._received_bytes = 0
        arguments["server_state"].connections.add(self)
        door.waiting.add(self)
        transport.set_protocol(self)
        transport.write(answer)
        transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self._received_bytes += len(data)
        if self._received_bytes > LINGER_BYTES:
            self.transport.abort()

    def overdue(self) -> None:
        """It has not closed."""
        self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._arguments["server_state"].connections.discard(self)
        self._door.waiting.remove(self)
        self._door.leave(self.transport)

    def shutdown(self) -> None:
        """uvicorn is shutting down."""
        self.transport.abort()


Guest: TypeAlias = Arrival | HttpConnection | Parting
"""A connection that is no session."""
