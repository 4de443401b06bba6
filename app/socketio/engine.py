"""Engine.IO 4: opens, finds and ends sessions, and answers their requests.

Requests arrive over ASGI. Where the server can hand over the connection (app/serving.py), a
WebSocket takes a shortcut: `accept` makes the connection itself the session.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from app.deadlines import Deadlines
from app.forwarded import Origins
from app.live.subscriber import UNLIMITED, CloseReason
from app.socketio import codec, rfc6455
from app.socketio.handshake import (
    VERSION,
    EngineError,
    EngineRequest,
    RequestRefused,
    request_of,
)
from app.socketio.queued import QueuedSession, answer_websocket_close
from app.socketio.session import INBOUND_BYTES, INBOUND_WINDOW_S, UNFINISHED_BYTES, Session
from app.socketio.websocket import WebSocketSession
from app.turns import Turns
from app.unfinished import Unfinished

logger = logging.getLogger("tablecast.socketio")

# Time allowed to CONNECT, to complete an upgrade, or to read a close frame.
PATIENCE_S = 10.0
# How long clients' messages may keep everything else waiting: after a restart, thousands of
# CONNECTs arrive at once.
TURN_S = 0.02
SID_BYTES = 15
MOST_REPORTED = 100
ANY_SID = "ANY_SID"
NO_STORE = {"Cache-Control": "no-store"}
SWITCHING = (
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: {}\r\n\r\n"
)


class Receiver(Protocol):
    """Receives the sessions' messages. All methods return at once."""

    def received(self, session: Session, data: Any) -> None:
        """Handle a message. Raises ProtocolError."""

    def replaced(self, old: Session, new: Session) -> None:
        """A session was upgraded: write to the new one."""

    def ended(self, session: Session) -> None:
        """A session has ended: write to it no more."""


@dataclass(frozen=True, slots=True)
class EngineStats:
    """`closed`: how many sessions have ended, by reason."""

    sessions: int
    closed: dict[CloseReason, int]


class Engine:
    """All sessions. Their heartbeats and deadlines share three timers.

    `ping_interval`, `ping_timeout`: in seconds. `max_sessions`: None for no limit.
    """

    def __init__(
        self,
        receiver: Receiver,
        *,
        ping_interval: float,
        ping_timeout: float,
        origins: Origins,
        max_sessions: int | None = None,
    ) -> None:
        self._receiver = receiver
        self._max_sessions = max_sessions or UNLIMITED
        self.connections = 0  # taken over and still open
        self._origins = origins
        self._reported: set[str] = set()
        self._stopping = False
        self._sessions: dict[str, Session] = {}
        self._closed = dict.fromkeys(CloseReason, 0)
        self._loop = asyncio.get_running_loop()
        self.pings: Deadlines[Session] = Deadlines(ping_interval, Session.ping)
        self.pongs: Deadlines[Session] = Deadlines(ping_timeout, Session.miss_pong)
        self.waiting: Deadlines[Session] = Deadlines(PATIENCE_S, lambda session: session.overdue())
        self.turns = Turns(TURN_S)
        self.unfinished: Unfinished[Session] = Unfinished(
            UNFINISHED_BYTES, lambda session: session.close(CloseReason.TOO_MANY_MESSAGES)
        )
        self._opening = {
            "pingInterval": round(ping_interval * 1000),
            "pingTimeout": round(ping_timeout * 1000),
            "maxPayload": INBOUND_BYTES,
        }
        self._open_packets: dict[Sequence[str], str] = {}

    def stats(self) -> EngineStats:
        """Count open sessions, and closed ones by reason."""
        return EngineStats(len(self._sessions), self._closed.copy())

    def close(self) -> None:
        """Close every transport, without a DISCONNECT so that clients reconnect, and open no new
        sessions: a proxy's connections may outlive the old ones by a moment.
        """
        self._stopping = True
        for session in list(self._sessions.values()):
            session.close(CloseReason.SERVER_STOPS)
        for session in list(self.waiting):  # upgrading, or closing
            session.overdue()

    # Sessions

    def window(self) -> int:
        """Return the number of the current inbound window."""
        return int(self._loop.time() / INBOUND_WINDOW_S)

    def received(self, session: Session, data: Any) -> None:
        self._receiver.received(session, data)

    def replace(self, old: Session, new: Session) -> None:
        self._sessions[new.sid] = new
        self.pings.remove(old)
        self.pongs.remove(old)
        self.waiting.remove(new)
        if self.waiting.remove(old):
            self.waiting.add(new)
        self.pings.add(new)
        new.subscribers, new.ended = old.subscribers, old.ended
        self._receiver.replaced(old, new)

    def ended(self, session: Session, reason: CloseReason) -> None:
        logger.debug("%s closed: %s", session.sid, reason)
        self._closed[reason] += 1
        self._sessions.pop(session.sid, None)
        self.pings.remove(session)
        self.pongs.remove(session)
        self.waiting.remove(session)
        self._receiver.ended(session)

    def disconnected(self) -> None:
        self.connections -= 1

    def _add(self, session: Session) -> None:
        self._sessions[session.sid] = session
        self.pings.add(session)
        self.waiting.add(session)

    def _open_packet(self, sid: str, upgrades: tuple[str, ...]) -> str:
        packet = self._open_packets.get(upgrades)
        if packet is None:
            opening = {"sid": ANY_SID, "upgrades": list(upgrades)} | self._opening
            packet = self._open_packets[upgrades] = codec.encode(codec.OPEN, opening)
        return packet.replace(ANY_SID, sid)

    # Requests

    def _judge(self, request: EngineRequest, websocket: bool, peer: str | None) -> Session | None:
        """Return the session of a request, None if it opens one. Raises RequestRefused."""
        if request.query.get("EIO") != VERSION:
            raise RequestRefused(EngineError.UNSUPPORTED_VERSION)
        if request.transport not in ("polling", "websocket"):
            raise RequestRefused(EngineError.UNKNOWN_TRANSPORT)
        if refusal := self._origins.refusal(request.headers, request.scheme, peer):
            self._report(refusal)
            raise RequestRefused(EngineError.FOREIGN_ORIGIN, refusal)
        if websocket != (request.transport == "websocket"):
            raise RequestRefused(EngineError.BAD_REQUEST)
        if request.sid is None:
            if request.method != "GET":
                raise RequestRefused(EngineError.BAD_METHOD)
            if self._stopping:
                raise RequestRefused(EngineError.STOPPING)
            if len(self._sessions) >= self._max_sessions:
                raise RequestRefused(EngineError.TOO_MANY_SESSIONS)
            return None
        session = self._sessions.get(request.sid)
        if session is None:
            raise RequestRefused(EngineError.UNKNOWN_SESSION)
        if not isinstance(session, QueuedSession) or session.upgraded:
            raise RequestRefused(EngineError.BAD_REQUEST)
        if websocket and session.candidate is not None:
            raise RequestRefused(EngineError.BAD_REQUEST)
        return session

    def _report(self, refusal: str) -> None:
        """Log why a page was refused, but only once: the page keeps trying forever."""
        if refusal not in self._reported and len(self._reported) < MOST_REPORTED:
            self._reported.add(refusal)
            logger.warning("%s", refusal)

    def accept(self, transport: asyncio.Transport, request: EngineRequest) -> None:
        """Answer a plain, valid upgrade; from now on a session owns the connection.

        Raises RequestRefused, before anything has changed.
        """
        peer = transport.get_extra_info("peername")
        old = self._judge(request, True, peer[0] if isinstance(peer, tuple) else None)
        switching = SWITCHING.format(rfc6455.accept(request.headers["sec-websocket-key"])).encode()
        if isinstance(old, QueuedSession):
            session = old.candidate = WebSocketSession(self, old.sid, transport, old)
            self.waiting.add(session)
        else:
            session = WebSocketSession(self, secrets.token_urlsafe(SID_BYTES), transport)
            self._add(session)
            switching += rfc6455.text_frame(self._open_packet(session.sid, ()).encode())
        self.connections += 1
        transport.set_protocol(session)
        transport.write(switching)

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request over ASGI: a poll, a POST or a WebSocket."""
        websocket = scope["type"] == "websocket"
        try:
            request = request_of(scope)
            client = scope.get("client")
            session = self._judge(request, websocket, client[0] if client else None)
            if websocket:
                await self._serve_websocket(session, receive, send)
                return
            response = await self._answer(request, session, Request(scope, receive))
        except RequestRefused as refused:
            logger.debug("a request was refused: %s", refused)
            response = JSONResponse(refused.body, refused.status, refused.headers)
            if websocket:
                await refuse_websocket(scope, send, response)
                return
        except ClientDisconnect:
            return  # nobody reads the answer
        await response(scope, receive, send)

    async def _answer(
        self, request: EngineRequest, session: Session | None, http: Request
    ) -> Response:
        if session is None:
            opened = QueuedSession(self, secrets.token_urlsafe(SID_BYTES))
            self._add(opened)
            return text(self._open_packet(opened.sid, ("websocket",)))
        assert isinstance(session, QueuedSession)
        if request.method == "GET":
            address = http.scope["query_string"].decode("latin-1")
            return text(codec.encode_payload(await session.poll(address, http.receive)))
        if request.method == "POST":
            return await self._post(session, http)
        raise RequestRefused(EngineError.BAD_REQUEST)

    async def _post(self, session: QueuedSession, http: Request) -> Response:
        body = bytearray()
        async for chunk in http.stream():
            body += chunk
            if len(body) > INBOUND_BYTES:
                session.close(CloseReason.PROTOCOL_ERROR)
                return text("The body is too large.", 413)
        if session.upgraded:
            raise RequestRefused(EngineError.BAD_REQUEST)
        try:
            packets = codec.decode_payload(bytes(body))
        except codec.ProtocolError as error:
            session.blame(error)
            raise RequestRefused(EngineError.BAD_REQUEST) from error
        await self.turns.done(partial(session.receive_packets, packets))
        if session.closed_by_fault():
            raise RequestRefused(EngineError.BAD_REQUEST)
        return text("ok")

    async def _serve_websocket(self, old: Session | None, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        await send({"type": "websocket.accept"})
        if isinstance(old, QueuedSession):
            await old.upgrade(receive, send)
        else:
            session = QueuedSession(self, secrets.token_urlsafe(SID_BYTES))
            session.upgraded = True
            self._add(session)
            session.write_packet(self._open_packet(session.sid, ()))
            await session.serve(receive, send)
        await answer_websocket_close(send)


def text(body: str, status: int = 200) -> Response:
    return Response(body, status, NO_STORE, "text/plain")


async def refuse_websocket(scope: Scope, send: Send, response: JSONResponse) -> None:
    """Refuse a WebSocket, with the response itself where the ASGI server can send it."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": json.dumps(response.body)})
        return
    start = {"status": response.status_code, "headers": response.raw_headers}
    await send({"type": "websocket.http.response.start"} | start)
    await send({"type": "websocket.http.response.body", "body": response.body})
