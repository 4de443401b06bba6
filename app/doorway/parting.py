"""The end of a connection that was refused."""

import asyncio
from typing import Any

from app.doorway.bounds import Bounds
from app.doorway.limits import LINGER_BYTES


class Parting(asyncio.Protocol):
    """Sends a peer its last answer, and gives it time to read: closing at once would reset the
    connection of a peer that is still sending, and the answer could be lost.
    """

    __slots__ = ("_arguments", "_bounds", "_received_bytes", "transport")

    def __init__(
        self,
        bounds: Bounds,
        transport: asyncio.Transport,
        arguments: dict[str, Any],
        answer: bytes,
    ) -> None:
        self._bounds = bounds
        self.transport = transport
        self._arguments = arguments
        self._received_bytes = 0
        arguments["server_state"].connections.add(self)
        bounds.waiting.add(self)
        transport.set_protocol(self)
        transport.write(answer)
        transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self._received_bytes += len(data)
        if self._received_bytes > LINGER_BYTES:
            self.transport.abort()

    def overdue(self) -> None:
        """The peer has not closed in time."""
        self.transport.abort()

    def turn_away(self, _: bytes) -> None:
        """The peer has been answered; there is no room to wait until it has read that."""
        self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._arguments["server_state"].connections.discard(self)
        self._bounds.waiting.remove(self)
        self._bounds.leave(self.transport)

    def shutdown(self) -> None:
        """uvicorn is shutting down."""
        self.transport.abort()
