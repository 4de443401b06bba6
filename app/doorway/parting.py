"""The end of a connection that was refused."""

import asyncio
from typing import Any

from app.doorway.bounds import Bounds
from app.doorway.limits import LINGER_BYTES


class Parting(asyncio.Protocol):
    """Gives a peer its last answer, and time to read it: closing at once resets the connection of a
    peer that still sends, and the answer may be lost.
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
        """It has not closed."""
        self.transport.abort()

    def turn_away(self, _: bytes) -> None:
        """It has its answer, and no time is left to take it."""
        self.transport.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._arguments["server_state"].connections.discard(self)
        self._bounds.waiting.remove(self)
        self._bounds.leave(self.transport)

    def shutdown(self) -> None:
        """uvicorn is shutting down."""
        self.transport.abort()
