"""The beginning of a connection, and the factory that makes it."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

from app.doorway.answers import TOO_LONG, TOO_SLOW
from app.doorway.bounds import Bounds
from app.doorway.http import HttpConnection
from app.doorway.limits import HEAD_BYTES
from app.doorway.parting import Parting
from app.doorway.upgrades import Upgrades
from app.hosts import Hosts
from app.socketio.handshake import HEAD_END, parse_upgrade


class Doorway:
    """Called by uvicorn to make the protocol of a new connection.

    `hosts`: those that requests may name. `max_clients`: see `Bounds`. `paths`: Socket.IO's.
    """

    def __init__(self, hosts: Hosts, max_clients: int, paths: Sequence[str]) -> None:
        self._bounds = Bounds(max_clients)
        self._upgrades = Upgrades(self._bounds, hosts, paths)

    def __call__(self, **arguments: Any) -> "Arrival":
        return Arrival(self._bounds, self._upgrades, arguments)


class Arrival(asyncio.Protocol):
    """Reads the head of a connection's first request and hands the connection to the Socket.IO
    server or to uvicorn, with every byte read so far.
    """

    __slots__ = ("_arguments", "_bounds", "_head", "_upgrades", "transport")

    def __init__(self, bounds: Bounds, upgrades: Upgrades, arguments: dict[str, Any]) -> None:
        self._bounds = bounds
        self._upgrades = upgrades
        self._arguments = arguments  # what uvicorn passes to its own protocol
        self._head: bytearray | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._arguments["server_state"].connections.add(self)
        self._bounds.waiting.add(self)
        self._bounds.enter(self.transport, self._arguments)

    def data_received(self, data: bytes) -> None:
        head: bytes | bytearray = data
        seen = 0
        if self._head is not None:
            seen = len(self._head)
            self._head += data
            head = self._head
        if not self._could_be_an_opening(head):
            self._pass_on(head)
            return
        end = head.find(HEAD_END, max(0, seen - len(HEAD_END) + 1))
        length = len(head) if end < 0 else end + len(HEAD_END)
        if length > HEAD_BYTES:
            self.refuse(TOO_LONG)
        elif end >= 0:
            self._open(bytes(head[:length]), bytes(head[length:]))
        elif head.find(b"\n\n", max(0, seen - 1)) >= 0:  # not HTTP, but HttpConnection answers it
            self._pass_on(head)
        else:
            if self._head is None:
                self._head = bytearray(data)
            self._bounds.unfinished.hold(self, len(data))

    def _could_be_an_opening(self, head: bytes | bytearray) -> bool:
        """Return whether the bytes so far are, or may become, a request on a Socket.IO path."""
        openings = self._upgrades.openings
        return head.startswith(openings) or any(path.startswith(head) for path in openings)

    def _open(self, head: bytes, rest: bytes) -> None:
        request = parse_upgrade(head, self._upgrades.paths)
        if request is None:
            self._pass_on(head + rest)
        else:
            self._leave()
            self._upgrades.open(self.transport, self._arguments, request, rest)

    def _pass_on(self, head: bytes | bytearray) -> None:
        self._leave()
        protocol = HttpConnection(self._bounds, self._upgrades, self._arguments)
        self.transport.set_protocol(protocol)
        protocol.connection_made(self.transport)
        protocol.data_received(bytes(head))

    def refuse(self, answer: bytes) -> None:
        """Answer a request that cannot be served, and close."""
        self._leave()
        Parting(self._bounds, self.transport, self._arguments, answer)

    def turn_away(self, answer: bytes) -> None:
        """Answer and close at once: there is no room to wait for the request or for the peer."""
        self.transport.write(answer)
        self.transport.close()

    def overdue(self) -> None:
        """The head of the first request did not arrive in time."""
        if self._head is None or self.transport.is_closing():
            self.transport.abort()
        else:
            self.refuse(TOO_SLOW)

    def connection_lost(self, _: Exception | None) -> None:
        self._leave()
        self._bounds.leave(self.transport)

    def shutdown(self) -> None:
        """uvicorn is shutting down; no request is pending."""
        self.transport.close()

    def _leave(self) -> None:
        self._arguments["server_state"].connections.discard(self)
        self._bounds.waiting.remove(self)
        self._bounds.unfinished.release(self)
