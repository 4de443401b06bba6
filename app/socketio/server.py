"""The Socket.IO server: connect, resume, refuse.

Engine.IO is python-engineio's, Socket.IO packets are python-socketio's. The part of
python-socketio between the two (rooms, handlers) is not used: a client joins one namespace and
sends nothing but CONNECT, and python-socketio would let it join, be sent to, and raise, in orders
this server rules out.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import engineio
from engineio.packet import OPEN, Packet
from socketio import packet as socketio_packet

from app.database.connections import UNAVAILABLE
from app.live.broadcast import Broadcast
from app.socketio import frames
from app.socketio.session import Connection, ProtocolError

logger = logging.getLogger("tablecast.sockets")

JOIN_TIMEOUT_S = 10.0
# CONNECT with an offset is the longest a client has to say.
INBOUND_BYTES = 100_000


class Server(engineio.AsyncServer):  # type: ignore[misc]  # python-engineio has no types
    """Sessions by both transports, and the one namespace `/`."""

    def __init__(
        self,
        broadcast: Broadcast,
        *,
        ping_interval: float,
        ping_timeout: float,
        allowed_origins: Sequence[str],
    ) -> None:
        super().__init__(
            async_mode="asgi",
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
            max_http_buffer_size=INBOUND_BYTES,
            cors_allowed_origins="*" if "*" in allowed_origins else list(allowed_origins) or None,
            async_handlers=False,
            monitor_clients=False,  # every connection has its own timers
            logger=logging.getLogger("engineio.server"),
        )
        self._broadcast = broadcast
        self._joining: dict[Connection, asyncio.Timeout] = {}

    async def _handle_connect(
        self, environ: dict[str, Any], transport: str, jsonp_index: int | None = None
    ) -> Any:
        """Open a session, as python-engineio does, with a bounded Connection."""
        connection = Connection(self, self.generate_id())
        self.sockets[connection.sid] = connection
        opening = {
            "sid": connection.sid,
            "upgrades": self._upgrades(connection.sid, transport),
            "pingInterval": int(self.ping_interval * 1000),
            "pingTimeout": int(self.ping_timeout * 1000),
            "maxPayload": self.max_http_buffer_size,
        }
        await connection.send(Packet(OPEN, opening))
        connection.schedule_ping()
        if transport == "websocket":
            try:
                return await connection.handle_get_request(environ)
            finally:
                connection.cut(self.reason.TRANSPORT_CLOSE)
        connection.connected = True
        return self._ok(await connection.poll(), jsonp_index=jsonp_index)

    def forget(self, connection: Connection, reason: str) -> None:
        """A session has ended: nothing of it stays."""
        logger.debug("%s ended: %s", connection.sid, reason)
        self.sockets.pop(connection.sid, None)
        self._broadcast.leave(connection)
        if (joining := self._joining.pop(connection, None)) is not None:
            joining.reschedule(0)  # nobody waits for it any more

    async def receive_message(self, connection: Connection, data: str | bytes) -> None:
        """Take one Socket.IO packet. Raises ProtocolError for what a client may not send."""
        if isinstance(data, bytes):
            raise ProtocolError("binary messages are refused")
        try:
            packet = socketio_packet.Packet(encoded_packet=data)
        except Exception as error:  # its decoder raises whatever the text leads it to
            raise ProtocolError(f"no Socket.IO packet: {error}") from error
        namespace = packet.namespace or "/"
        joined = self._broadcast.knows(connection)
        if packet.packet_type == socketio_packet.CONNECT:
            if namespace != "/":
                connection.write(frames.refuse(namespace, "There is no such namespace."))
                raise ProtocolError(f"CONNECT to {namespace}")
            if joined:
                raise ProtocolError("CONNECT twice")
            await self._join(connection, packet.data)
        elif not joined or namespace != "/":
            raise ProtocolError("a packet for a namespace that was not joined")
        elif packet.packet_type == socketio_packet.DISCONNECT:
            self._broadcast.leave(connection)
            connection.expect_connect()
        elif packet.packet_type == socketio_packet.EVENT:
            self._refuse_event(packet.data)
        else:
            raise ProtocolError("binary packets and acknowledgements are refused")

    def _refuse_event(self, data: Any) -> None:
        """Clients have no events to send: REST and SQL are the way. A well-formed one is passed
        over, one with a name of the library's own is an error.
        """
        if not isinstance(data, list) or not data or not isinstance(data[0], str):
            raise ProtocolError("an event without a name")
        if data[0] in RESERVED_EVENTS:
            raise ProtocolError(f"the event name {data[0]!r} is reserved")
        logger.debug("an event %r was ignored", data[0])

    async def _join(self, connection: Connection, auth: Any) -> None:
        connection.connect_arrived()
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S) as joining:
                self._joining[connection] = joining
                try:
                    await self._broadcast.join(connection, auth)
                finally:
                    self._joining.pop(connection, None)
        except UNAVAILABLE as error:
            # Not a CONNECT_ERROR: after one the client would not try again by itself.
            connection.cut(f"it cannot join now: {error or type(error).__name__}")
        except Exception:
            logger.exception("joining failed")
            connection.cut("joining failed")

    def close(self) -> None:
        """End every session by closing its transport; a Socket.IO DISCONNECT would keep the
        clients from coming back.
        """
        for connection in list(self.sockets.values()):
            connection.cut("the server stops")


RESERVED_EVENTS = frozenset(
    {"connect", "connect_error", "disconnect", "disconnecting", "newListener", "removeListener"}
)
