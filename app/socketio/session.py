"""One Engine.IO session, whatever carries it: what a client may send, heartbeats, closing."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Protocol

from app.deadlines import Deadlines
from app.live.subscriber import UNLIMITED, CloseReason, Subscriber
from app.socketio.codec import CLOSE, MESSAGE, PONG, ProtocolError, decode
from app.socketio.frames import Frames, Outgoing
from app.turns import Turns
from app.unfinished import Unfinished

logger = logging.getLogger("tablecast.socketio")

# Messages a client may send per window: heartbeats, and a CONNECT for each subscription (all at
# once when it returns), which may be long enough to count as two.
INBOUND_MESSAGES = 150
INBOUND_WINDOW_S = 10.0
# The longest message is a CONNECT with an offset. A long one counts as several.
INBOUND_BYTES = 100_000
COUNTED_BYTES = 4_000
# What the incomplete messages of all sessions may hold together.
UNFINISHED_BYTES = 8 * 1024 * 1024
# How much may be unsent to a client that sends another CONNECT.
UNREAD_BYTES = 2 * 1024 * 1024


class Keeper(Protocol):
    """Owns the sessions: the engine."""

    pings: Deadlines["Session"]
    pongs: Deadlines["Session"]
    waiting: Deadlines["Session"]
    turns: Turns
    unfinished: Unfinished["Session"]

    def window(self) -> int:
        """Return the number of the current inbound window."""

    def received(self, session: "Session", data: Any) -> None:
        """Handle an Engine.IO message. Raises ProtocolError."""

    def replace(self, old: "Session", new: "Session") -> None:
        """Put a session in place of the one it was upgraded from."""

    def ended(self, session: "Session", reason: CloseReason) -> None:
        """Forget a session."""

    def disconnected(self) -> None:
        """A connection that was taken over has ended."""


class Session(ABC):
    """What all transports have in common. Each brings its own methods that write."""

    __slots__ = ("_behind", "_inbound", "_turns", "_window", "closed", "ended", "keeper", "sid",
                 "subscribers")  # fmt: skip

    def __init__(self, keeper: Keeper, sid: str) -> None:
        self.keeper = keeper
        self.sid = sid
        self.closed = False
        self.subscribers: dict[str, Subscriber] = {}  # by namespace
        self.ended: frozenset[str] = frozenset()  # namespaces that were joined and then refused
        self._behind: int | None = None
        self._inbound = 0
        self._window = 0
        self._turns: tuple[asyncio.Future[None], ...] = ()  # of the tasks that wait in `drained`

    def __str__(self) -> str:
        return self.sid

    # Outgoing

    @abstractmethod
    def try_write(self, message: Outgoing, limit_bytes: int) -> bool:
        """Write unless more than `limit_bytes` are unsent; return whether the client kept up.

        Once closed, nothing is written.
        """

    @abstractmethod
    def write_packet(self, packet: str) -> None:
        """Write one Engine.IO packet."""

    @abstractmethod
    def write_ping(self) -> None:
        """Write a PING, ahead of what is unsent where that is possible."""

    @abstractmethod
    def unsent_bytes(self) -> int:
        """Return how many bytes have been written but not sent."""

    @abstractmethod
    def progress(self) -> int:
        """Return a number that grows whenever the client reads, whatever is written meanwhile."""

    @abstractmethod
    def is_behind(self) -> bool:
        """Return whether the client has not read all that was written, as far as we can tell."""

    @abstractmethod
    def is_full(self) -> bool:
        """Return whether much is unsent."""

    async def drained(self) -> None:
        """Wait until little is unsent or the session is closed. Waiting tasks take turns."""
        while self.is_full() and not self.closed:
            turn = asyncio.get_running_loop().create_future()
            self._turns += (turn,)
            await turn

    def give_turns(self) -> None:
        """Let the tasks that wait in `drained` write, one after the other, until much is unsent."""
        if self._turns and (self.closed or not self.is_full()):
            turn, *others = self._turns
            self._turns = tuple(others)
            if not turn.done():  # else its task was cancelled
                turn.set_result(None)
            asyncio.get_running_loop().call_soon(self.give_turns)

    def write(self, message: Frames) -> None:
        """Write regardless of how much is unsent."""
        self.try_write(message, UNLIMITED)

    def ping(self) -> None:
        """Send a heartbeat, and expect an answer."""
        self._await_pong()
        self.write_ping()

    def _await_pong(self) -> None:
        """Expect an answer in time. If the client is behind, note how far it has read: the ping may
        reach it late.
        """
        self._behind = self.progress() if self.is_behind() else None
        self.keeper.pongs.add(self)

    def miss_pong(self) -> None:
        """Close the session, unless the client was behind and has been reading since."""
        if self._behind is not None and self.progress() > self._behind:
            self._await_pong()
        else:
            self.close(CloseReason.HEARTBEAT_MISSED)

    # Incoming

    def receive(self, message: str | bytes) -> None:
        """Handle an encoded packet; disconnect a client that breaks the protocol."""
        try:
            packet_type, data = decode(message)
        except ProtocolError as error:
            self.blame(error)
        else:
            self.receive_packet(packet_type, data)

    def receive_packets(self, packets: Iterable[tuple[int, Any]]) -> None:
        """Handle packets, given types and data; disconnect a client that breaks the protocol."""
        for packet_type, data in packets:
            self.receive_packet(packet_type, data)

    def receive_packet(self, packet_type: int, data: Any) -> None:
        """Handle a packet; disconnect a client that breaks the protocol."""
        if self.closed:
            return
        if packet_type == PONG and self.keeper.pongs.remove(self):
            self.keeper.pings.add(self)
            return
        length = len(data) if isinstance(data, str | bytes) else 0
        if not self.count_inbound(length) or packet_type == PONG:
            return
        try:
            if packet_type == MESSAGE:
                self.keeper.received(self, data)
            elif packet_type == CLOSE:
                self.close(CloseReason.CLIENT_CLOSED)
            else:
                raise ProtocolError("not a packet that a client sends")
        except ProtocolError as error:
            self.blame(error)
        except Exception:
            logger.exception("%s: a packet could not be handled", self.sid)
            self.close(CloseReason.INTERNAL_ERROR)

    def count_inbound(self, length: int = 0) -> bool:
        """Count an inbound message. If a client sends too many, disconnect it and return False."""
        window = self.keeper.window()
        if window != self._window:
            self._inbound, self._window = 0, window
        self._inbound += 1 + length // COUNTED_BYTES
        if self._inbound > INBOUND_MESSAGES:
            self.close(CloseReason.TOO_MANY_MESSAGES)
            return False
        return True

    def blame(self, error: Exception) -> None:
        """Disconnect a client that broke the protocol."""
        logger.info("%s: %s", self.sid, error)
        self.close(CloseReason.PROTOCOL_ERROR)

    # Closing

    def await_connect(self, awaited: bool) -> None:
        """Start the deadline for a CONNECT, or cancel it."""
        if awaited:
            self.keeper.waiting.add(self)
        else:
            self.keeper.waiting.remove(self)

    def overdue(self) -> None:
        """The client missed a deadline."""
        self.close(CloseReason.NO_CONNECT)

    @abstractmethod
    def close(self, reason: CloseReason) -> None:
        """Disconnect the client. If it is alive, it reconnects and continues."""
