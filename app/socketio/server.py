"""Socket.IO 5: namespaces, CONNECT and its answer, DISCONNECT. A client's events are ignored.

python-socketio's server is not used: joining, writing and leaving happen here, in an order that
leaves no gap.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import Receive, Scope, Send

from app.forwarded import Origins
from app.live.broadcast import Broadcast
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.live.subscriber import CloseReason, Encoder
from app.socketio import codec, frames
from app.socketio.codec import ProtocolError
from app.socketio.connecting import ConnectPayload, except_for
from app.socketio.engine import Engine, EngineStats
from app.socketio.handshake import EngineRequest
from app.socketio.session import UNREAD_BYTES, Session

logger = logging.getLogger("tablecast.socketio")

ID_BYTES = 12
HALF_SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_NAMESPACE = 200
LONGEST_EVENT = 8_000
MOST_NAMESPACES = 50
CHANGES = Encoder(frames.changes, frames.state)
TIMED_CHANGES = Encoder(frames.timed_changes, frames.state)
RESERVED_EVENTS = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
)


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
        """How many connections were taken over and are still open."""
        return self._engine.connections

    async def handle_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request over ASGI on a Socket.IO path."""
        await self._engine.handle_request(scope, receive, send)

    def accept(self, transport: asyncio.Transport, request: EngineRequest) -> None:
        """Take over the connection of a plain, valid upgrade. Raises RequestRefused."""
        self._engine.accept(transport, request)

    def close(self) -> None:
        """End every session by closing its transport. A Socket.IO DISCONNECT would keep the clients
        from coming back.
        """
        self._engine.close()

    # The engine's side

    def received(self, session: Session, data: Any) -> None:
        """Handle one Socket.IO packet. Raises ProtocolError for what a client may not send."""
        if not isinstance(data, str):
            raise ProtocolError("binary messages are refused")
        if HALF_SURROGATE.search(data):
            raise ProtocolError("a text that is not Unicode")
        if data.startswith(str(codec.EVENT)) and len(data) > LONGEST_EVENT and session.subscribers:
            return  # ignored like shorter ones, but without decoding it, which takes long
        packet = codec.decode_message(data)
        namespace = packet.namespace or "/"
        if namespace in session.ended and packet.packet_type != codec.CONNECT:
            return  # the client may not know yet that it was refused
        if packet.packet_type == codec.CONNECT and session.unsent_bytes() > UNREAD_BYTES:
            session.close(CloseReason.STALLED)
        elif packet.packet_type == codec.CONNECT:
            if namespace in session.subscribers:
                raise ProtocolError("CONNECT twice")
            self._connect(session, namespace, packet.data)
        elif namespace not in session.subscribers:
            raise ProtocolError("a packet for a namespace that was not joined")
        elif packet.packet_type == codec.DISCONNECT:
            self._forget(session, namespace)
        elif packet.packet_type == codec.EVENT:
            ignore_event(packet.data)
        else:
            raise ProtocolError("binary packets and acknowledgements are refused")

    def replaced(self, old: Session, new: Session) -> None:
        """Move the subscribers to the new session."""
        old.subscribers = {}
        for subscriber in new.subscribers.values():
            self._broadcast.move(subscriber, new)

    def ended(self, session: Session) -> None:
        """Leave everything that a session has joined."""
        for subscriber in session.subscribers.values():
            self._broadcast.leave(subscriber)
        session.subscribers = {}

    def refuse(self, session: Session, namespace: str, refused: SubscriptionRefused) -> None:
        """Tell a client that it gets nothing, or nothing more, in a namespace."""
        session.write(frames.refuse(namespace, refused))
        if namespace in session.subscribers and len(session.ended) < MOST_NAMESPACES:
            session.ended |= {namespace}
        self._forget(session, namespace)

    def _forget(self, session: Session, namespace: str) -> None:
        """Leave a namespace; no error if the session has not joined it."""
        subscriber = session.subscribers.pop(namespace, None)
        if subscriber is not None:
            self._broadcast.leave(subscriber)
            if not session.subscribers:
                session.await_connect(True)

    def _connect(self, session: Session, namespace: str, data: Any) -> None:
        try:
            if len(session.subscribers) >= MOST_NAMESPACES:
                raise too_many_namespaces()
            if len(namespace) > LONGEST_NAMESPACE:
                raise too_long(namespace)
            self._join(session, namespace, ConnectPayload.read(namespace, data))
        except SubscriptionRefused as refused:
            self.refuse(session, namespace, refused)

    def _join(self, session: Session, namespace: str, payload: ConnectPayload) -> None:
        encode: Any
        if payload.request is not None:
            encode = frames.NamespaceEncoder(namespace, payload.timing)
        else:
            encode = TIMED_CHANGES if payload.timing else CHANGES
        session.ended -= {namespace}
        answer = ConnectAnswer(self.refuse, namespace, payload)
        session.subscribers[namespace] = self._broadcast.subscribe(
            session, encode, payload.since, answer, payload.request
        )
        session.await_connect(False)


class ConnectAnswer:
    """Answers CONNECT and says hello, usually both at once."""

    def __init__(
        self,
        refuse: Callable[[Session, str, SubscriptionRefused], None],
        namespace: str,
        payload: ConnectPayload,
    ) -> None:
        # Not the session's own id: anyone who knows that can poll in its place.
        self._sid = secrets.token_urlsafe(ID_BYTES)
        self._refuse = refuse
        self._namespace = namespace
        self._request = payload.request
        self._pid = payload.pid
        self._outdated = payload.outdated
        self._shows_key = payload.key
        self._is_connected = False

    @property
    def _new_pid(self) -> str:
        """An id that shows, when the client returns, what it had asked for. It does not vouch for
        an offset that the client has kept from another subscription: the client may receive this
        answer without the hello.
        """
        if self._request is None:
            return self._sid
        pid = f"{self._request.fingerprint}.{self._sid}"
        return pid if self._outdated is None else except_for(pid, self._outdated)

    def hold(self, session: Session) -> None:
        """Answer CONNECT before it is known whether the client can continue: some clients give up
        after a second. Its own `pid` would tell it that it can, so it gets a new one.
        """
        self._is_connected = True
        session.write(frames.connected(self._namespace, self._sid, self._new_pid))

    def welcome(
        self, session: Session, recovered: bool, offset: str, key: Sequence[str] | None = None
    ) -> None:
        """Tell the client where it continues. If it is recovered, it gets back its own `pid`."""
        hello = frames.hello(self._namespace, recovered, offset, key if self._shows_key else None)
        if not self._is_connected:
            self._is_connected = True
            pid = self._pid if recovered and self._pid else self._new_pid
            hello = frames.connected(self._namespace, self._sid, pid) + hello
        session.write(hello)

    def refuse(self, session: Session, refused: SubscriptionRefused) -> None:
        """Tell the client why it gets nothing, or nothing more."""
        self._refuse(session, self._namespace, refused)


def too_many_namespaces() -> SubscriptionRefused:
    """Return the refusal for one namespace too many."""
    return SubscriptionRefused(
        RefusalCode.TOO_MANY,
        f"One connection can hold {MOST_NAMESPACES} subscriptions: open another one for more.",
    )


def too_long(namespace: str) -> SubscriptionRefused:
    """Return the refusal for a namespace that is too long."""
    return SubscriptionRefused(
        RefusalCode.TOO_MANY,
        f"The namespace has {len(namespace)} characters, and {LONGEST_NAMESPACE} are allowed: use"
        " a shorter label.",
        "topic",
    )


def ignore_event(data: Any) -> None:
    """Ignore an event: clients write through REST or SQL.

    Raises ProtocolError for an event without a name, or with a reserved one.
    """
    if not isinstance(data, list) or not data or not isinstance(data[0], str):
        raise ProtocolError("an event without a name")
    if data[0] in RESERVED_EVENTS:
        raise ProtocolError(f"the event name {data[0]!r} is reserved")
    logger.debug("an event %r was ignored", data[0])
