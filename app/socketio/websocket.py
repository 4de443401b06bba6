"""A session that is its own WebSocket: asyncio protocol, frame parser and session in one object.

An idle client costs nothing more. Nothing here is a coroutine.
"""

import asyncio
import socket
import sys
from functools import partial

from app.live.subscriber import CloseReason
from app.socketio.codec import CONFIRM, PING, PROBE, PROBE_ANSWER
from app.socketio.frames import Outgoing
from app.socketio.queued import QueuedSession
from app.socketio.rfc6455 import (
    CloseCode,
    Opcode,
    Violation,
    close_frame,
    frame,
    parse_frame,
    read_close,
    text_frame,
)
from app.socketio.session import INBOUND_BYTES, Keeper, Session

# With more than this unsent, a connection is aborted instead of closed with a close frame. Usually
# there is little.
PARTING_BYTES = 64 * 1024
# Members of `struct tcp_info` (linux/tcp.h): `tcpi_unacked`, `tcpi_bytes_acked` and
# `tcpi_notsent_bytes`.
UNACKED = slice(24, 28)
BYTES_ACKED = slice(120, 128)
NOTSENT_BYTES = slice(144, 148)
TCP_INFO_BYTES = 148
PARTING_CODES = {
    CloseReason.CLIENT_CLOSED: CloseCode.NORMAL,
    CloseReason.PROTOCOL_ERROR: CloseCode.PROTOCOL_ERROR,
}


class WebSocketSession(Session, asyncio.Protocol):
    """A session on a connection that has been upgraded to a WebSocket.

    With `upgraded_from` it is a candidate: once the client has probed it and confirmed, it takes
    the place of that session.
    """

    __slots__ = ("_fragments", "_is_text", "_paused", "_transport", "_unanswered", "_unparsed",
                 "_upgraded_from")  # fmt: skip

    def __init__(
        self,
        keeper: Keeper,
        sid: str,
        transport: asyncio.Transport,
        upgraded_from: QueuedSession | None = None,
    ) -> None:
        super().__init__(keeper, sid)
        self._transport = transport
        self._upgraded_from = upgraded_from
        self._unparsed: bytearray | None = None
        self._fragments: bytearray | None = None
        self._is_text = False
        self._paused = False
        self._unanswered: bytes | None = None  # the payload of the last ping

    # Outgoing

    def try_write(self, message: Outgoing, limit_bytes: int) -> bool:
        transport = self._transport
        if transport.get_write_buffer_size() > limit_bytes:
            return False
        if not (self.closed or transport.is_closing()):
            transport.write(message.websocket)
        return True

    def write_packet(self, packet: str) -> None:
        if not (self.closed or self._transport.is_closing()):
            self._transport.write(text_frame(packet.encode()))

    def write_ping(self) -> None:
        self.write_packet(str(PING))

    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size()

    def progress(self) -> int:
        """Return the bytes that the client's machine has acknowledged, where the system tells us.

        The unsent bytes say less: others write meanwhile, and the kernel, which buffers megabytes
        for a slow client, makes room in large steps.
        """
        return self._tcp_info(BYTES_ACKED) or -self.unsent_bytes()

    def is_behind(self) -> bool:
        return bool(self.unsent_bytes() or self._tcp_info(UNACKED, NOTSENT_BYTES))

    def _tcp_info(self, *members: slice) -> int:
        """Return the sum of what the kernel counts on the connection; 0 where it does not tell."""
        if sys.platform != "linux":
            return 0
        try:
            own = self._transport.get_extra_info("socket")
            info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        except (OSError, ValueError):  # it is closed
            return 0
        return sum(int.from_bytes(info[member], sys.byteorder) for member in members)

    def is_full(self) -> bool:
        return self._paused

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._answer_ping()
        self.give_turns()

    # Incoming

    def data_received(self, data: bytes) -> None:
        if not self.closed and not self.keeper.turns.do(partial(self._receive, data)):
            self._transport.pause_reading()

    def _receive(self, data: bytes) -> None:
        if self.closed:
            return
        self._transport.resume_reading()
        was_unfinished = self._is_unfinished
        given: bytes | bytearray = data
        if self._unparsed is not None:
            self._unparsed += data
            given = self._unparsed
        at = 0
        try:
            while (found := parse_frame(given, at, INBOUND_BYTES)) is not None:
                at = found.end
                self._take(found.fin, found.opcode, found.payload)
                if self.closed:
                    return
        except Violation as violation:
            self._part(violation.code, CloseReason.PROTOCOL_ERROR)
            return
        if at == len(given):
            self._unparsed = None
        elif at or self._unparsed is None:  # else `given` is `_unparsed`, unchanged
            self._unparsed = bytearray(given[at:])
        if was_unfinished:
            self.keeper.unfinished.release(self)
        if self._is_unfinished:
            held = len(self._unparsed or b"") + len(self._fragments or b"")
            self.keeper.unfinished.hold(self, held)

    @property
    def _is_unfinished(self) -> bool:
        return self._unparsed is not None or self._fragments is not None

    def _take(self, fin: bool, opcode: int, payload: bytes) -> None:
        match opcode:
            case Opcode.TEXT | Opcode.BINARY:
                if self._fragments is not None:
                    raise Violation(CloseCode.PROTOCOL_ERROR, "a message within another")
                self._is_text = opcode == Opcode.TEXT
                if fin:
                    self._take_message(payload)
                elif self.count_inbound():
                    self._fragments = bytearray(payload)
            case Opcode.CONTINUATION:
                self._continue(fin, payload)
            case Opcode.PING:
                if self.count_inbound():
                    self._unanswered = payload
                    self._answer_ping()
            case Opcode.PONG:
                self.count_inbound()
            case Opcode.CLOSE:
                self._part(read_close(payload), CloseReason.CLIENT_CLOSED)

    def _answer_ping(self) -> None:
        """Answer the last ping, but while the client has much to read, only once it has read: the
        last one suffices (RFC 6455, section 5.5.3), and answers nobody reads do not pile up.
        """
        if self._unanswered is not None and not (self._paused or self.closed):
            self._transport.write(frame(Opcode.PONG, self._unanswered))
            self._unanswered = None

    def _continue(self, fin: bool, payload: bytes) -> None:
        if self._fragments is None:
            raise Violation(CloseCode.PROTOCOL_ERROR, "a continuation of nothing")
        self._fragments += payload
        if len(self._fragments) > INBOUND_BYTES:
            raise Violation(CloseCode.TOO_BIG, f"a message of more than {INBOUND_BYTES} bytes")
        if fin:
            message, self._fragments = bytes(self._fragments), None
            self._take_message(message)
        else:
            self.count_inbound()

    def _take_message(self, payload: bytes) -> None:
        if not self._is_text:
            self.receive(payload)
            return
        try:
            text = payload.decode()
        except UnicodeDecodeError:
            raise Violation(CloseCode.NOT_UTF8, "a text that is not UTF-8") from None
        if self._upgraded_from is not None:
            self._probe(self._upgraded_from, text)
        else:
            self.receive(text)

    def _probe(self, old: QueuedSession, text: str) -> None:
        """Take a step of the upgrade: answer the probe, then switch over when the client confirms
        (Engine.IO protocol, section "Upgrade").
        """
        if text == PROBE and old.begin_probe(self):
            self.write_packet(PROBE_ANSWER)
        elif text == CONFIRM and old.prober is self and not old.closed:
            self._upgraded_from = None
            packets = old.hand_over()
            for packet in packets:
                self.write_packet(packet)
            self.keeper.replace(old, self)
        else:
            self.close(CloseReason.PROTOCOL_ERROR)

    # Closing

    def close(self, reason: CloseReason) -> None:
        if self.closed:
            return
        code = PARTING_CODES.get(reason)
        if code is None:
            self._end(reason)
            self._transport.abort()
        else:
            self._part(code, reason)

    def _part(self, code: int, reason: CloseReason) -> None:
        """Send a close frame and close; abort if much is unsent, or the client takes too long."""
        transport = self._transport
        if transport.get_write_buffer_size() > PARTING_BYTES:
            self._end(reason)
            transport.abort()
            return
        transport.write(close_frame(code))
        self._end(reason)
        transport.close()
        self.keeper.waiting.add(self)

    def _end(self, reason: CloseReason) -> None:
        self.closed = True
        self._unparsed = self._fragments = None
        self.keeper.unfinished.release(self)
        self.give_turns()
        if self._upgraded_from is not None:
            self._upgraded_from.end_probe(self)
            self._upgraded_from = None
            self.keeper.waiting.remove(self)
        else:
            self.keeper.ended(self, reason)

    def overdue(self) -> None:
        if self.closed:
            self._transport.abort()
        else:
            super().overdue()

    def connection_lost(self, _: Exception | None) -> None:
        self.close(CloseReason.CONNECTION_LOST)
        self.keeper.waiting.remove(self)
        self.keeper.disconnected()
