"""What goes out, encoded once: packets for any transport, one byte string for WebSockets."""

import json
from collections.abc import Iterable
from functools import cached_property, partial

from engineio.packet import MESSAGE, Packet

from app.feed.log import Change, Page
from app.feed.offset import Epoch

CONNECT, EVENT, CONNECT_ERROR = "0", "2", "4"  # Socket.IO packet types


_json = partial(json.dumps, separators=(",", ":"))


def websocket_frame(payload: bytes) -> bytes:
    """An unmasked, unfragmented text frame (RFC 6455, section 5.2)."""
    length = len(payload)
    if length < 126:
        return b"\x81" + length.to_bytes(1) + payload
    if length < 65536:
        return b"\x81\x7e" + length.to_bytes(2) + payload
    return b"\x81\x7f" + length.to_bytes(8) + payload


class Frames:
    """A run of Socket.IO packets for the root namespace, given as their text."""

    def __init__(self, packets: Iterable[str]) -> None:
        self._texts = list(packets)

    @cached_property
    def packets(self) -> list[Packet]:
        """As Engine.IO messages, to be queued."""
        return [Packet(MESSAGE, text) for text in self._texts]

    @cached_property
    def websocket(self) -> bytes:
        """As WebSocket frames, joined: one write for however many changes."""
        return b"".join(websocket_frame(b"4" + text.encode()) for text in self._texts)

    @property
    def length(self) -> int:
        """How many characters the packets have together."""
        return sum(map(len, self._texts))

    def __add__(self, other: "Frames") -> "Frames":
        return Frames(self._texts + other._texts)


def welcome(sid: str, pid: str, recovered: bool, offset: str) -> Frames:
    """The answer to CONNECT, and `feed:hello`: from here on the client has an offset. A client that
    gets back the `pid` it sent takes itself as recovered.
    """
    return Frames(
        [
            CONNECT + _json({"sid": sid, "pid": pid}),
            EVENT + _json(["feed:hello", {"recovered": recovered}, offset]),
        ]
    )


def refuse(namespace: str, reason: str) -> Frames:
    """CONNECT_ERROR, to a namespace that is none."""
    prefix = "" if namespace == "/" else f"{namespace},"
    return Frames([CONNECT_ERROR + prefix + _json({"message": reason})])


def timing(written: int, read: int) -> Frames:
    """`feed:timing`, for clients that asked: when what follows was written and read (ms)."""
    return Frames([EVENT + _json(["feed:timing", {"at": written, "now": read}])])


def changes(page: Page, epoch: Epoch) -> Frames:
    """The events of a page. Rows are passed on as Postgres wrote them, never parsed; topics and
    offsets hold nothing that JSON would escape.
    """
    if not page.changes:
        return Frames([])
    until = page.until
    write_id = epoch.writer(page.since.position, until.until or until.position)
    offsets = [write_id(change.id) for change in page.changes]
    if until.until is None:
        offsets[-1] = epoch.format(until)
    return Frames(
        f'{EVENT}["{change.topic}:{change.op}",{change.body},"{offset}"]'
        if change.body is not None
        else without_body(change, offset)
        for change, offset in zip(page.changes, offsets, strict=True)
    )


def without_body(change: Change, offset: str) -> str:
    """A truncate; or `feed:hello` once more, for one topic: what clients have of it is void."""
    if change.op == "reload":
        return EVENT + _json(["feed:hello", {"recovered": False, "topic": change.topic}, offset])
    return f'{EVENT}["{change.topic}:{change.op}","{offset}"]'
