"""One Engine.IO session: bounded in what it queues, in what it may send, and in how long it may
be silent.

python-engineio's socket keeps a writer task, a reader task and a ping task a client, queues
without bound, ignores protocol errors and measures time by the wall clock. This one writes
straight to the WebSocket where the server lends it (app/serving.py), and has timers, not tasks.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from engineio.async_drivers.asgi import WebSocket
from engineio.async_socket import AsyncSocket
from engineio.exceptions import EngineIOError
from engineio.packet import CLOSE, MESSAGE, NOOP, PING, PONG, UPGRADE, Packet

from app.socketio.frames import Frames, websocket_frame

logger = logging.getLogger("tablecast.sockets")

# A session has so long to send CONNECT, and again after it left the namespace.
CONNECT_DEADLINE_S = 10.0
# What a client may do wrong before it is cut off.
TOLERATED_ERRORS = 3
# Messages a client may send in a window; it has little to say but CONNECT.
INBOUND_MESSAGES = 50
INBOUND_WINDOW_S = 10.0
# The Python client refuses to decode more packets in one polling answer.
POLL_PACKETS = 16
QUEUED_PACKETS = 10_000


class ProtocolError(Exception):
    """The client sent what the protocol or this server does not allow."""


class WebSocketTransport(Protocol):
    """What app/serving.py lends to the application: the way past ASGI's `send`."""

    transport: asyncio.Transport

    def write_frames(self, frames: bytes) -> None: ...
    def unsent_bytes(self) -> int: ...
    async def drained(self) -> None: ...
    def forget_handshake(self) -> None: ...
    def abort(self) -> None: ...


LENT_TRANSPORT = "tablecast.websocket"  # the key among the scope's extensions


class Connection(AsyncSocket):  # type: ignore[misc]  # python-engineio has no types
    """One Engine.IO session."""

    connected: bool
    upgrading: bool
    closed: bool

    def __init__(self, server: Any, sid: str) -> None:
        super().__init__(server, sid)
        self._loop = asyncio.get_running_loop()
        self._websocket: WebSocketTransport | None = None
        self._unsent_bytes = 0
        self._taken = asyncio.Event()
        self._polling = False
        self._last_poll = ""
        self._errors = 0
        self._inbound = 0
        self._inbound_since = self._loop.time()
        self._deadline: asyncio.TimerHandle | None = None
        self._ping_timer: asyncio.TimerHandle | None = None
        self.expect_connect()

    # Going out

    def write(self, frames: Frames) -> None:
        """Send packets, in order, without waiting."""
        if self.closed:
            return
        if self._websocket is not None:
            self._websocket.write_frames(frames.websocket)
        else:
            for packet in frames.packets:
                self._enqueue(packet)

    async def send(self, packet: Packet) -> None:
        """Send one packet; what python-engineio itself calls."""
        if self._websocket is not None:
            self._websocket.write_frames(websocket_frame(packet.encode().encode()))
        else:
            self._enqueue(packet)

    def _enqueue(self, packet: Packet) -> None:
        self._unsent_bytes += size(packet)
        self.queue.put_nowait(packet)

    @property
    def transport(self) -> asyncio.Transport | None:
        """Where frames can be written straight, if this is a WebSocket and the server lends it."""
        return None if self._websocket is None else self._websocket.transport

    def offer(self, frames: Frames, limit_bytes: int) -> bool:
        """Send packets unless the client has left so much untaken; whether they were sent."""
        if self.unsent_bytes() > limit_bytes or self.queue.qsize() > QUEUED_PACKETS:
            return False
        self.write(frames)
        return True

    async def drained(self) -> None:
        """Wait until the client has taken (nearly) all that waits for it."""
        if self._websocket is not None:
            await self._websocket.drained()
            return
        while self.queue.qsize() > POLL_PACKETS and not self.closed:
            self._taken.clear()
            await self._taken.wait()

    async def handle_get_request(self, environ: dict[str, Any]) -> Any:
        """A poll, or the way to a WebSocket. Raises EngineIOError, which answers 400.

        A poll whose answer may not have arrived ends the session, because what it held would be
        missing: when its connection ends first, and when the same poll comes again. (HTTP clients,
        browsers too, repeat a GET by themselves if a kept connection breaks under it.)
        """
        if "HTTP_UPGRADE" in environ:
            return await super().handle_get_request(environ)
        query = environ["QUERY_STRING"]
        if self._polling or ("&t=" in query and query == self._last_poll):
            self.cut("a poll came twice")
            raise EngineIOError("a poll came twice")
        self._last_poll, self._polling = query, True
        polled = asyncio.ensure_future(super().handle_get_request(environ))
        gone = asyncio.ensure_future(environ["asgi.receive"]())
        try:
            await asyncio.wait([polled, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.cut(self.server.reason.TRANSPORT_CLOSE)
            return await polled
        finally:
            self._polling = False
            polled.cancel()
            gone.cancel()

    def unsent_bytes(self) -> int:
        """What the client has not taken."""
        if self._websocket is not None:
            return self._websocket.unsent_bytes()
        return self._unsent_bytes

    async def poll(self) -> list[Packet]:
        """The next packets for the polling transport, or for a server that lends no transport.

        The end comes alone. The official client takes note of what it is sent a moment after it has
        it; of an event that comes in one answer with CLOSE it would take note after the next
        connect, for which it still asked to continue from before that event.
        """
        packets: list[Packet] = []
        packet = await self.queue.get()
        while packet is not None:
            packets.append(packet)
            self._unsent_bytes -= size(packet)
            if len(packets) == POLL_PACKETS or self.queue.empty():
                break
            packet = self.queue.get_nowait()
        self._taken.set()
        if packet is None and packets:
            self.queue.put_nowait(None)
        return packets or ([] if self.upgraded else [Packet(CLOSE)])

    # Staying alive

    def schedule_ping(self) -> None:
        """Ping after an interval. Called at the start and at every PONG."""
        self._set_ping_timer(self.server.ping_interval, self._ping)

    def _ping(self) -> None:
        if self._websocket is not None:
            self._websocket.write_frames(PING_FRAME)
        else:
            self._enqueue(Packet(PING))
        self._set_ping_timer(
            self.server.ping_timeout, lambda: self.cut(self.server.reason.PING_TIMEOUT)
        )

    def _set_ping_timer(self, seconds: float, then: Callable[[], None]) -> None:
        if self._ping_timer is not None:
            self._ping_timer.cancel()
        self._ping_timer = None if self.closed else self._loop.call_later(seconds, then)

    async def check_ping_timeout(self) -> bool:
        """python-engineio asks before it sends; the timer has the say here."""
        return not self.closed

    def expect_connect(self) -> None:
        """Cut the session off unless it joins the namespace in time."""
        self.connect_arrived()
        self._deadline = self._loop.call_later(CONNECT_DEADLINE_S, self.cut, "no CONNECT")

    def connect_arrived(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # Coming in

    async def receive(self, packet: Packet) -> None:
        """Take one packet from the client; cuts it off when it does not behave."""
        if self.closed:
            return
        try:
            self._count_inbound()
            if packet.packet_type == PONG:
                self.schedule_ping()
            elif packet.packet_type == MESSAGE:
                await self.server.receive_message(self, packet.data)
            elif packet.packet_type == UPGRADE:
                await self.send(Packet(NOOP))
            elif packet.packet_type == CLOSE:
                self.cut(self.server.reason.CLIENT_DISCONNECT)
            else:
                raise ProtocolError("not a packet a client sends")
        except ProtocolError as error:
            self.blame(error)

    def blame(self, error: Exception) -> None:
        """Count what a client did wrong; after a few times it is cut off."""
        self._errors += 1
        logger.info("%s: %s", self.sid, error)
        if self._errors >= TOLERATED_ERRORS:
            self.cut("protocol errors")

    def _count_inbound(self) -> None:
        now = self._loop.time()
        if now - self._inbound_since > INBOUND_WINDOW_S:
            self._inbound, self._inbound_since = 0, now
        self._inbound += 1
        if self._inbound > INBOUND_MESSAGES:
            self.cut("too many messages")
            raise ProtocolError("too many messages")

    async def handle_post_request(self, environ: dict[str, Any]) -> None:
        """Packets by the polling transport. Raises EngineIOError, which answers 400, while the
        session lives: python-engineio ends it then, and cannot where it has ended already.
        """
        try:
            await super().handle_post_request(environ)
        except (EngineIOError, ValueError) as error:  # ValueError: not UTF-8, no packets, too many
            if not self.closed:
                raise EngineIOError(str(error)) from error

    async def _upgrade_websocket(self, environ: dict[str, Any]) -> Any:
        lent = environ["asgi.scope"].get("extensions", {}).get(LENT_TRANSPORT)
        if lent is None:
            return await super()._upgrade_websocket(environ)
        scope = environ["asgi.scope"]

        async def serve(ws: WebSocket) -> None:
            # What only the handshake needed is most of what an idle client would cost.
            environ.clear()
            scope["headers"] = []
            lent.forget_handshake()
            await self._serve(ws, lent)

        return await WebSocket(serve, self.server)(environ)

    async def _serve(self, ws: WebSocket, lent: WebSocketTransport) -> None:
        try:
            if self.connected and not await self._upgrade(ws):
                return
        except OSError:
            return  # the peer is gone; the session lives on by polling
        self.connected = self.upgraded = True
        self._websocket = lent
        while not self.queue.empty():
            lent.write_frames(websocket_frame(self.queue.get_nowait().encode().encode()))
        self._unsent_bytes = 0
        self._taken.set()
        try:
            while not self.closed:
                await self._receive_text(await ws.wait())
        except OSError:
            pass  # the peer is gone
        finally:
            self.cut(self.server.reason.TRANSPORT_CLOSE)

    async def _upgrade(self, ws: WebSocket) -> bool:
        """From polling to WebSocket: probe, release the waiting poll, and wait for the switch."""
        if self.upgrading:
            return False
        self.upgrading = True
        try:
            if await ws.wait() != "2probe":
                return False
            await ws.send("3probe")
            self._enqueue(Packet(NOOP))
            return bool(await ws.wait() == "5") and not self.closed
        finally:
            self.upgrading = False

    async def _receive_text(self, data: str | bytes) -> None:
        try:
            if isinstance(data, bytes):
                raise ProtocolError("binary messages are refused")
            await self.receive(Packet(encoded_packet=data))
        except (ProtocolError, ValueError) as error:
            self.blame(error)

    # The end

    def cut(self, reason: str) -> None:
        """End the session at once. The client, if it lives, comes back and continues."""
        if self.closed:
            return
        self.closed = self.closing = True
        self.connect_arrived()
        self._set_ping_timer(0, lambda: None)
        self.server.forget(self, reason)
        self._taken.set()
        if self._websocket is not None:
            self._websocket.abort()
        else:
            self.queue.put_nowait(None)

    async def close(self, *_: object, reason: str = "", **__: object) -> None:
        """python-engineio's own way to end a session."""
        self.cut(reason or self.server.reason.SERVER_DISCONNECT)


def size(packet: Packet) -> int:
    return len(packet.data) if isinstance(packet.data, str) else 0


PING_FRAME = websocket_frame(b"2")
