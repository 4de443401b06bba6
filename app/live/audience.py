"""The clients that are where the log is, and the loop that sends them a page."""

import asyncio
from dataclasses import dataclass

from app.live.recent import Part
from app.socketio.session import Connection


@dataclass(eq=False, slots=True)
class Client:
    """Who has joined. `catching_up` is the task that replays, while it does."""

    connection: Connection
    timing: bool
    catching_up: asyncio.Task[None] | None = None


class Live:
    """Sends every page to every client in it.

    Most are kept by their transport, and found by nothing else: to walk to it from the client, over
    objects none of which is in the processor's cache, would take a tenth of what the kernel takes
    to send.
    """

    def __init__(self) -> None:
        self._direct: dict[asyncio.Transport, Client] = {}
        self._others: set[Client] = set()

    def __len__(self) -> int:
        return len(self._direct) + len(self._others)

    def add(self, client: Client) -> None:
        """From now on a client gets every page."""
        transport = client.connection.transport
        if transport is None or client.timing:
            self._others.add(client)
        else:
            self._direct[transport] = client

    def discard(self, client: Client) -> None:
        """Send a client no more; not an error if it got nothing."""
        self._others.discard(client)
        transport = client.connection.transport
        if transport is not None:
            self._direct.pop(transport, None)

    def send(self, part: Part, limit_bytes: int) -> list[Client]:
        """Send a page, but not to clients that have not taken more than so many bytes of what they
        were sent before: those are taken out, and returned.
        """
        behind = []
        frames = part.frames.websocket
        for transport in self._direct:
            if transport.get_write_buffer_size() > limit_bytes:
                behind.append(self._direct[transport])
            elif not transport.is_closing():
                transport.write(frames)
        for client in list(self._others):
            sent = part.timed_frames if client.timing else part.frames
            if not client.connection.offer(sent, limit_bytes):
                behind.append(client)
            elif client.connection.transport is not None and not client.timing:
                self._others.discard(client)  # it has upgraded from polling
                self.add(client)
        for client in behind:
            self.discard(client)
        return behind
