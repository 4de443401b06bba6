"""What connections that are not sessions share: their number, deadlines and unfinished bytes."""

import asyncio
from typing import Any, Protocol, cast

from app.deadlines import Deadlines
from app.doorway import limits
from app.doorway.answers import BUSY, FULL
from app.doorway.limits import UNFINISHED_BYTES, extra_connections
from app.unfinished import Unfinished


class Guest(Protocol):
    """A connection that is not a session."""

    def overdue(self) -> None:
        """It has missed its deadline."""

    def turn_away(self, answer: bytes) -> None:
        """There is no room for it: answer and close at once, without waiting for the peer."""


class Sender(Guest, Protocol):
    """A guest that is sending the body of a request."""

    def body_overdue(self) -> None:
        """The body did not arrive in time."""


class Bounds:
    """Counts guests and what they hold.

    `max_clients`: how many connections are served. Some more are accepted, but not for new
    Socket.IO clients.
    """

    def __init__(self, max_clients: int) -> None:
        self._max_clients = max_clients
        self._most_extra = extra_connections(max_clients)
        self._extra: dict[asyncio.Transport, None] = {}  # oldest first
        self.unfinished: Unfinished[Guest] = Unfinished(
            UNFINISHED_BYTES, lambda guest: guest.turn_away(BUSY)
        )
        self.waiting: Deadlines[Guest] = Deadlines(limits.PATIENCE_S, lambda guest: guest.overdue())
        self.bodies: Deadlines[Sender] = Deadlines(
            limits.BODY_S, lambda sender: sender.body_overdue()
        )

    def enter(self, transport: asyncio.Transport, arguments: dict[str, Any]) -> None:
        """Add a new connection. When there are too many, the oldest of the extra ones is closed: an
        honest peer has sent its request by then.
        """
        sessions = arguments["app_state"]["socketio"].connections
        if len(arguments["server_state"].connections) + sessions <= self._max_clients:
            return
        if len(self._extra) >= self._most_extra:
            oldest = next(iter(self._extra))
            del self._extra[oldest]
            cast(Guest, oldest.get_protocol()).turn_away(FULL)
        self._extra[transport] = None

    def is_extra(self, transport: asyncio.Transport) -> bool:
        """Return whether a connection is beyond `max_clients`."""
        return transport in self._extra

    def leave(self, transport: asyncio.Transport) -> None:
        """Forget a connection."""
        self._extra.pop(transport, None)
