"""A session whose packets wait in a queue: for HTTP long polling, and for WebSockets where the ASGI
server is not ours.
"""

import asyncio
import logging
from collections import deque
from contextlib import suppress
from functools import partial
from math import inf

from starlette.types import Receive, Send

from app.live.subscriber import UNLIMITED, CloseReason
from app.socketio.codec import (
    CLOSE,
    CONFIRM,
    NOOP,
    PING,
    POLL_PACKETS,
    PROBE,
    PROBE_ANSWER,
    ProtocolError,
)
from app.socketio.frames import Outgoing
from app.socketio.handshake import EngineError, RequestRefused
from app.socketio.session import INBOUND_BYTES, Keeper, Session

logger = logging.getLogger("tablecast.socketio")

QUEUED_PACKETS = 10_000
# An answer to a poll ends with the packet that makes it longer than this. Only the next poll shows
# that the client has read it.
POLL_CHARS = 128 * 1024
PROBE_TIMEOUT_S = 10.0
CLOSE_TIMEOUT_S = 10.0


class QueuedSession(Session):
    """Packets wait until a poll, or the task that serves a WebSocket, takes them.

    `upgraded`: a WebSocket takes them. `candidate`: the WebSocket that may take over; `prober`: the
    same one, once the client has sent its probe.
    """

    __slots__ = ("_is_sending", "_last_poll", "_polling", "_queue", "_reason", "_taken",
                 "_unsent_bytes", "_waiters", "candidate", "prober", "upgraded")  # fmt: skip

    def __init__(self, keeper: Keeper, sid: str) -> None:
        super().__init__(keeper, sid)
        self._queue: deque[str] = deque()
        self._unsent_bytes = 0
        self._taken = 0  # packets so far
        self._waiters: list[asyncio.Future[None]] = []
        self._polling = False
        self._is_sending = False
        self._last_poll = ""
        self._reason: CloseReason | None = None
        self.upgraded = False
        self.candidate: object | None = None
        self.prober: object | None = None

    # Outgoing

    def try_write(self, message: Outgoing, limit_bytes: int) -> bool:
        full = self._unsent_bytes > limit_bytes or len(self._queue) > QUEUED_PACKETS
        if full and limit_bytes < UNLIMITED:
            return False
        for packet in message.packets:
            self.write_packet(packet)
        return True

    def write_packet(self, packet: str) -> None:
        if not self.closed:
            self._queue.append(packet)
            self._unsent_bytes += len(packet)
            self._wake()

    def write_ping(self) -> None:
        if not self.closed:
            self._queue.appendleft(str(PING))
            self._unsent_bytes += 1
            self._wake()

    def unsent_bytes(self) -> int:
        return self._unsent_bytes

    def progress(self) -> int:
        """Return how many packets polls, or the task that serves a WebSocket, have taken."""
        return self._taken

    def is_behind(self) -> bool:
        is_reading = self._is_sending if self.upgraded else not self._polling
        return bool(self._queue) or is_reading

    def is_full(self) -> bool:
        return len(self._queue) > POLL_PACKETS or self._unsent_bytes > POLL_CHARS

    def take(self, most: float = inf, most_chars: float = inf) -> list[str]:
        """Take packets out of the queue, oldest first: at least one, if there is any."""
        packets: list[str] = []
        chars = 0
        while self._queue and len(packets) < most and chars < most_chars:
            packets.append(self._queue.popleft())
            chars += len(packets[-1])
        self._unsent_bytes -= chars
        self._taken += len(packets)
        self.give_turns()
        return packets

    # Polls

    async def poll(self, address: str, receive: Receive) -> list[str]:
        """Return the packets that answer a poll, or raise RequestRefused.

        A response that may have been lost ends the session, because its packets would be missing:
        when the connection closes first, or when the same poll is repeated. (HTTP clients,
        including browsers, repeat a GET by themselves if a kept-alive connection breaks.)
        """
        if self._polling or ("&t=" in address and address == self._last_poll):
            self.close(CloseReason.POLLED_TWICE)
            raise RequestRefused(EngineError.BAD_REQUEST)
        self._last_poll, self._polling = address, True
        ready = asyncio.ensure_future(self._ready_for_poll())
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait([ready, gone], return_when=asyncio.FIRST_COMPLETED)
            if gone.done():
                self.close(CloseReason.CONNECTION_LOST)
        finally:
            self._polling = False
            ready.cancel()
            gone.cancel()
        if self.upgraded:
            return [str(NOOP)]
        if self.closed:
            return self._last_answer()
        return self.take(POLL_PACKETS, POLL_CHARS) or [str(NOOP)]

    async def _ready_for_poll(self) -> None:
        while not (self._queue or self.closed or self.prober or self.upgraded):
            await self._change()

    def _last_answer(self) -> list[str]:
        """Return what a waiting poll gets when the session closes, or raise RequestRefused.

        CLOSE is sent only where the protocol's tests require it: python-engineio's client takes it
        as final and never reconnects.
        """
        if self._reason is CloseReason.CLIENT_CLOSED:
            return [str(NOOP)]
        if self._reason is CloseReason.POLLED_TWICE:
            return [str(CLOSE)]
        raise RequestRefused(EngineError.UNKNOWN_SESSION)

    def begin_probe(self, prober: object) -> bool:
        """Let a WebSocket be probed: from now on polls are answered at once. Return whether that is
        possible now.
        """
        if self.closed or self.upgraded or self.prober is not None:
            return False
        self.prober = prober
        self._wake()
        return True

    def end_probe(self, candidate: object) -> None:
        """Give up an upgrade; polling goes on."""
        if self.candidate is candidate:
            self.candidate = self.prober = None

    # A WebSocket of any ASGI server

    async def upgrade(self, receive: Receive, send: Send) -> None:
        """Switch to an accepted WebSocket once the client has probed it and confirmed."""
        if self.candidate is not None:
            return
        self.candidate = receive
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                if await received_text(receive) != PROBE or not self.begin_probe(receive):
                    return
                await send({"type": "websocket.send", "text": PROBE_ANSWER})
                if await received_text(receive) != CONFIRM or self.closed:
                    return
        except TimeoutError:
            return
        finally:
            self.end_probe(receive)
        self.upgraded = True
        self._wake()
        await self.serve(receive, send)

    async def serve(self, receive: Receive, send: Send) -> None:
        """Serve an accepted WebSocket until either side ends it."""
        tasks = [
            asyncio.create_task(self._send_queue(send), name=f"send {self.sid}"),
            asyncio.create_task(self._receive_all(receive), name=f"receive {self.sid}"),
            asyncio.create_task(self._parted(), name=f"end {self.sid}"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.close(CloseReason.CONNECTION_LOST)
            for task in tasks:
                task.cancel()
            for ended in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(ended, Exception) and not isinstance(ended, OSError):
                    logger.error("%s: serving it has failed", self, exc_info=ended)

    async def _send_queue(self, send: Send) -> None:
        while True:
            for packet in self.take(1):
                self._is_sending = True
                await send({"type": "websocket.send", "text": packet})
                self._is_sending = False
            if not self._queue:
                if self.closed:
                    return
                await self._change()

    async def _parted(self) -> None:
        """Wait until the session is closed, and its client has had time to read what is unsent."""
        while not self.closed:
            await self._change()
        await asyncio.sleep(CLOSE_TIMEOUT_S)

    async def _receive_all(self, receive: Receive) -> None:
        while not self.closed:
            event = await receive()
            if event["type"] != "websocket.receive":
                return
            text = event.get("text")
            message = event["bytes"] if text is None else text
            if len(message) > INBOUND_BYTES:
                self.blame(ProtocolError("a message that is too long"))
            else:
                await self.keeper.turns.done(partial(self.receive, message))

    # Closing

    def closed_by_fault(self) -> bool:
        """Return whether it was closed for any reason but the client's own CLOSE."""
        return self.closed and self._reason is not CloseReason.CLIENT_CLOSED

    def hand_over(self) -> list[str]:
        """Make way for another session; return the unsent packets."""
        packets = self.take()
        self.closed = self.upgraded = True
        self._wake()
        return packets

    def close(self, reason: CloseReason) -> None:
        if not self.closed:
            self.closed, self._reason = True, reason
            self.give_turns()
            self._wake()
            self.keeper.ended(self, reason)

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def _change(self) -> None:
        """Wait until a packet is queued or the session's state changes."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        await waiter


async def disconnected(receive: Receive) -> None:
    """Wait until the client of an HTTP request has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def received_text(receive: Receive) -> str | None:
    """Return the next message on a WebSocket, None if it is not text."""
    event = await receive()
    text: str | None = event.get("text")
    return text


async def answer_websocket_close(send: Send) -> None:
    """Close an accepted WebSocket, whatever state it is in, even if its client reads nothing."""
    with suppress(OSError, RuntimeError, TimeoutError):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await send({"type": "websocket.close"})
