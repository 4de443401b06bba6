"""A transport that sends a response's head and body at once."""

import asyncio
from typing import Any


class Gathering:
    """A transport that gathers what is written until the next turn of the event loop.

    uvicorn writes the head and the body of a response separately, so a process that is killed in
    between has sent only the head. python-engineio's polling client never recovers from that:
    unlike a broken connection, it is not a failure that it expects.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def flush(self) -> None:
        """Send what has been written so far, unless the peer has gone."""
        parts, self._parts = self._parts, []
        if parts and not self._transport.is_closing():
            self._transport.write(b"".join(parts))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
