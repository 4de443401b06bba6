"""Connections that carry HTTP requests: uvicorn's protocol, within limits."""

import asyncio
from collections import deque
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from app.doorway.answers import FULL, NO_WEBSOCKET, NOT_AN_UPGRADE, NOT_HTTP, TOO_LONG, TOO_SLOW
from app.doorway.bounds import Bounds
from app.doorway.gathering import Gathering
from app.doorway.limits import HEAD_BYTES, MOST_PIPELINED
from app.doorway.parting import Parting
from app.doorway.upgrades import Upgrades
from app.socketio.handshake import HEAD_END, upgrade_of


class HttpConnection(HttpToolsProtocol):
    """uvicorn's protocol, fed no more than a request may have, with deadlines that share timers.

    httptools keeps the part of a header that it has seen, and copies it with every part that
    follows, so it must not be fed endless headers. It calls back when it has read something
    complete; bytes that lead to no callback are counted.
    """

    def __init__(self, bounds: Bounds, upgrades: Upgrades, arguments: dict[str, Any]) -> None:
        super().__init__(**arguments)
        self._bounds = bounds
        self._upgrades = upgrades
        self._arguments = arguments
        self._extra = False
        self._body = bytearray()  # read but not passed on yet
        self._fruitless_bytes = 0  # fed since the last callback
        self._fruitful = False
        self._in_head = self._in_body = False
        self._deaf = False  # read nothing more; the pending answers are the last
        self._refusal = NOT_HTTP
        self._unsent_bytes = 0
        self._unanswered: deque[RequestResponseCycle] = deque()
        self._other_upgrade = False

    # Incoming

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._answers = Gathering(transport)
        self._extra = self._bounds.is_extra(transport)
        self._bounds.waiting.add(self)

    def data_received(self, data: bytes) -> None:
        at = 0
        while at < len(data) and not self._deaf:
            piece = data[at : at + HEAD_BYTES]
            at += len(piece)
            try:
                self.parser.feed_data(piece)
            except httptools.HttpParserUpgrade as upgrade:
                at -= len(piece) - upgrade.args[0]
                if self._other_upgrade:
                    data, at = self._without_upgrade() + data[at:], 0
                elif self._should_upgrade():
                    self._open_websocket(data[at:])
                    return
            except httptools.HttpParserError:
                self.refuse(self._refusal)
            else:
                self._take_body()
                self._count(len(piece))

    def _take_body(self) -> None:
        """Pass on what has been read of a body: in one piece, as its chunks may be a byte each."""
        if self._body:
            self._fruitful = True
            super().on_body(bytes(self._body))
            self._body.clear()

    def _count(self, fed_bytes: int) -> None:
        if self._in_head or self._in_body:
            self._bounds.unfinished.hold(self, fed_bytes)
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
        """The head is complete. Raises ValueError, which the parser turns into its own error."""
        if self.head_bytes() > HEAD_BYTES:
            self._refusal = TOO_LONG
            raise ValueError
        if self._extra and self._is_new_client():
            self._refusal = FULL
            raise ValueError
        if len(self.pipeline) >= MOST_PIPELINED:
            raise ValueError
        offers = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        is_websocket = offers and self._should_upgrade()
        if offers and not is_websocket:
            self._other_upgrade = True
            return
        self._take_target()
        super().on_headers_complete()
        if not is_websocket:
            self.cycle.transport = cast(asyncio.Transport, self._answers)
            self._unanswered.append(self.cycle)
        self._fruitful, self._in_head, self._in_body = True, False, True
        if not self.transport.get_write_buffer_size():  # else the peer must go on reading
            self._bounds.waiting.remove(self)
        self._bounds.bodies.add(self)
        if self._extra and self.cycle is not None:
            self.cycle.keep_alive = False

    def head_bytes(self) -> int:
        """Return the length of a request's URL and headers, including what separates them."""
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def _is_new_client(self) -> bool:
        """Return whether the request opens a session; clients that have one may poll and post."""
        path, _, query = self.url.partition(b"?")
        return unquote(path.decode("latin-1")) in self._upgrades.paths and b"sid=" not in query

    def _take_target(self) -> None:
        """If the target is a whole URL, use the host in it (RFC 9112, section 3.2.2)."""
        if not self.url.startswith((b"/", b"*")):
            target = httptools.parse_url(self.url)
            host = (target.host or b"") + (b":%d" % target.port if target.port else b"")
            self.headers[:] = [each for each in self.headers if each[0] != b"host"]
            self.headers.append((b"host", host))

    def _without_upgrade(self) -> bytes:
        """Return the head of a request that offers another protocol, such as HTTP/2, without the
        offer.

        After an offer the parser reads no body: it would take what follows the head for the next
        request. A new parser reads this head, and then the body.
        """
        self._other_upgrade = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        close = any(
            name == b"connection" and b"close" in value.lower() for name, value in self.headers
        )
        kept = [each for each in self.headers if each[0] not in (b"connection", b"upgrade")]
        if close:
            kept.append((b"connection", b"close"))
        self.parser = httptools.HttpRequestParser(self)
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % each for each in kept]
        return b"\r\n".join(lines) + HEAD_END

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._other_upgrade:
            return
        self._take_body()
        self._fruitful, self._in_body = True, False
        self._bounds.bodies.remove(self)
        self._bounds.unfinished.release(self)
        super().on_message_complete()

    # Upgrades that are not a connection's first request, or have an unusual form

    def _should_upgrade_to_ws(self) -> bool:
        return True

    def _open_websocket(self, early: bytes) -> None:
        path = self.url.partition(b"?")[0].decode("latin-1")
        method = self.parser.get_method().decode()
        request = upgrade_of(method, self.parser.get_http_version(), self.url, self.headers)
        if self._answering():
            self.refuse(NOT_AN_UPGRADE)
        elif path not in self._upgrades.paths:
            self.refuse(NO_WEBSOCKET)
        elif request is None:
            self.refuse(NOT_AN_UPGRADE)
        else:
            self._detach()
            self._upgrades.open(self.transport, self._arguments, request, early)

    # Outgoing

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        self._answers.flush()
        self._unanswered.popleft()
        super().on_response_complete()
        self._unset_keepalive_if_required()  # `waiting` has one timer for all
        if self._answering():
            return
        if self._in_body and not self.transport.is_closing():
            self._part(b"")  # answered without waiting for the body
        else:
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._answering():
            self._bounds.waiting.remove(self)

    def _watch(self) -> None:
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._bounds.waiting.add(self)

    # Closing

    def overdue(self) -> None:
        """The peer has read nothing of a response, or sent no request, for too long."""
        unsent_bytes = self.transport.get_write_buffer_size()
        if 0 < unsent_bytes < self._unsent_bytes:
            self._watch()  # it is reading, if slowly
        elif unsent_bytes or self.transport.is_closing():
            self.transport.abort()
        elif self._in_head:
            self.refuse(TOO_SLOW)
        elif not self._answering():
            self.transport.close()

    def body_overdue(self) -> None:
        """The body of a request did not arrive in time."""
        self.refuse(TOO_SLOW)

    def refuse(self, answer: bytes) -> None:
        """Answer something that is not a request, and close. While an earlier request is being
        answered, close after that instead.
        """
        self._deaf = True
        if self._may_answer() and not self.transport.is_closing():
            self._part(answer)
        elif self._answering() and not self._in_body:
            self.cycle.keep_alive = False
        else:
            self.transport.abort()

    def turn_away(self, answer: bytes) -> None:
        """Answer and close at once: there is no room to wait for the request or for the peer."""
        self._deaf = True
        if self._may_answer():
            self.transport.write(answer)
        self.transport.close()

    def _may_answer(self) -> bool:
        """Return whether an answer sent now would be to the request that is coming in."""
        unanswered = self._in_body and not self.cycle.response_started and not self.pipeline
        return unanswered or not self._answering()

    def _part(self, answer: bytes) -> None:
        self._detach()
        Parting(self._bounds, self.transport, self._arguments, answer)

    def _detach(self) -> None:
        """Give the connection away; a handler still running sees its client disconnect."""
        self.flow.resume_reading()
        self._answers.flush()
        self._forget()
        super().connection_lost(ConnectionAbortedError())

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._bounds.leave(self.transport)
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """uvicorn is shutting down. Do not wait for the rest of a request."""
        if self._in_body:
            self.transport.abort()
        else:
            super().shutdown()

    def _forget(self) -> None:
        for cycle in self._unanswered:  # uvicorn notifies only the last of them
            cycle.disconnected = True
            cycle.message_event.set()
        self._bounds.unfinished.release(self)
        self._bounds.waiting.remove(self)
        self._bounds.bodies.remove(self)
