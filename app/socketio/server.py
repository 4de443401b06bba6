"""Socket.IO 5: one namespace, CONNECT and its answer; a client sends nothing else.

python-socketio's server is not used: joining, writing and leaving happen here, in an order that
leaves no gap.
"""

import asyncio
import logging
import re
import secrets
from dataclasses import dataclass
from typing import Any

from starlette.types import Receive, Scope, Send

from app.forwarded import Origins
from app.live.broadcast import Broadcast
from app.live.subscriber import CloseReason, Encoder
from app.socketio import codec, frames
from app.socketio.codec import ProtocolError
from app.socketio.engine import Engine, EngineStats
from app.socketio.handshake import EngineRequest
from app.socketio.session import UNREAD_BYTES, Session

logger = logging.getLogger("tablecast.socketio")

ID_BYTES = 12
HALF_SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_NAMESPACE = 200
LONGEST_EVENT = 8_000
PID = re.compile(r"[A-Za-z0-9_.~-]{1,100}")
CHANGES = Encoder(frames.changes, frames.state)
TIMED_CHANGES = Encoder(frames.timed_changes, frames.state)
RESERVED_EVENTS = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
)


@dataclass(frozen=True, slots=True)
class ConnectPayload:
    """What a client says with CONNECT.

    `pid` and `offset` come from official clients that were connected before, `since` from those
    that have a list.
    """

    pid: str | None
    since: str | None
    timing: bool

    @classmethod
    def read(cls, payload: Any) -> "ConnectPayload":
        """Read the payload of a CONNECT packet, whatever it is."""
        given = payload if isinstance(payload, dict) else {}
        pid, offset, since = given.get("pid"), given.get("offset"), given.get("since")
        timing = given.get("timing") is True
        if isinstance(pid, str) and PID.fullmatch(pid) and isinstance(offset, str):
            return cls(pid, offset, timing)
        return cls(None, since if isinstance(since, str) else None, timing)


class SocketIO:
    """The Socket.IO server: handles the messages of all sessions."""

    def __init__(
        self,
        broadcast: Broadcast,
        *,
        ping_interval: float,
        ping_timeout: float,
        origins: Origins,
        max_clients: int | None = None,
    ) -> None:
        self._broadcast = broadcast
        self._engine = Engine(
            self,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
            origins=origins,
            max_sessions=max_clients,
        )

    def stats(self) -> EngineStats:
        """Count open sessions, and closed ones by reason."""
        return self._engine.stats()

    @property
    def connections(self) -> int:
        """How many connections were taken over."""
        return self._engine.connections

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request over ASGI on a Socket.IO path."""
        await self._engine.handle_request(scope, receive, send)

    def accept(self, transport: asyncio.Transport, request: EngineRequest) -> None:
        """Take over the connection of a plain, good upgrade. Raises RequestRefused."""
        self._engine.accept(transport, request)

    def close(self) -> None:
        """End every session by closing its transport. A Socket.IO DISCONNECT would keep the clients
        from coming back.
        """
        self._engine.close()

    # The engine's side

    def received(self, session: Session, data: Any) -> None:
        """Take one Socket.IO packet. Raises ProtocolError for what a client may not send."""
        if not isinstance(data, str):
            raise ProtocolError("binary messages are refused")
        if HALF_SURROGATE.search(data):
            raise ProtocolError("a text that is not Unicode")
        if data.startswith(str(codec.EVENT)) and len(data) > LONGEST_EVENT and session.subscriber:
            return  # ignored like shorter ones, without the time it takes to decode it
        packet = codec.decode_message(data)
        namespace = packet.namespace or "/"
        if len(namespace) > LONGEST_NAMESPACE:
            raise ProtocolError("a namespace that is too long")
        if packet.packet_type == codec.CONNECT and session.unsent_bytes() > UNREAD_BYTES:
            session.close(CloseReason.STALLED)
        elif packet.packet_type == codec.CONNECT and namespace != "/":
            session.write(frames.refuse(namespace, "Invalid namespace"))
        elif packet.packet_type == codec.CONNECT:
            if session.subscriber is not None:
                raise ProtocolError("CONNECT twice")
            self._join(session, ConnectPayload.read(packet.data))
        elif session.subscriber is None or namespace != "/":
            raise ProtocolError("a packet for a namespace that was not joined")
        elif packet.packet_type == codec.DISCONNECT:
            self.ended(session)
            session.await_connect(True)
        elif packet.packet_type == codec.EVENT:
            ignore_event(packet.data)
        else:
            raise ProtocolError("binary packets and acknowledgements are refused")

    def replaced(self, old: Session, new: Session) -> None:
        """Continue on the new session."""
        old.subscriber = None
        if new.subscriber is not None:
            self._broadcast.move(new.subscriber, new)

    def ended(self, session: Session) -> None:
        """Forget what a session has joined."""
        if session.subscriber is not None:
            self._broadcast.leave(session.subscriber)
            session.subscriber = None

    def _join(self, session: Session, payload: ConnectPayload) -> None:
        session.await_connect(False)
        encode = TIMED_CHANGES if payload.timing else CHANGES
        greeting = ConnectAnswer(payload.pid)
        session.subscriber = self._broadcast.subscribe(session, encode, payload.since, greeting)


class ConnectAnswer:
    """Answers CONNECT and says hello, usually both at once. `pid` is what the client came with."""

    def __init__(self, pid: str | None) -> None:
        # Not the session's own id: anyone who knows that one can poll for the session.
        self._sid = secrets.token_urlsafe(ID_BYTES)
        self._pid = pid
        self._is_connected = False

    def hold(self, session: Session) -> None:
        """Answer CONNECT before it is known whether the client can continue: some give up after a
        second. Its `pid` would say that it can, so it gets another one.
        """
        self._is_connected = True
        session.write(frames.connected(self._sid, self._sid))

    def welcome(self, session: Session, recovered: bool, offset: str) -> None:
        """Say where the client continues; if it does, it gets back the `pid` it came with."""
        if self._is_connected:
            session.write(frames.hello(recovered, offset))
        else:
            pid = self._pid if self._pid is not None and recovered else self._sid
            session.write(frames.welcome(self._sid, pid, recovered, offset))


def ignore_event(data: Any) -> None:
    """Clients have no events to send; they write through REST or SQL. Events are ignored, but
    reserved names are an error.
    """
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise ProtocolError("an event without a name")
    if data[0] in RESERVED_EVENTS:
        raise ProtocolError(f"the event name {data[0]!r} is reserved")
    logger.debug("an event %r was ignored", data[0])
