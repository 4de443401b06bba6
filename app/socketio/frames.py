"""What goes out, encoded once: Socket.IO packets as text for polling, as bytes for WebSockets."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import msgspec

from app.feed.health import Outage
from app.feed.log import Change, Page
from app.feed.offset import Epoch
from app.socketio.codec import CONNECT, CONNECT_ERROR, EVENT, MESSAGE
from app.socketio.rfc6455 import text_frame


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


class Frames:
    """A run of Socket.IO packets, as Engine.IO messages."""

    __slots__ = ("__dict__", "packets")

    def __init__(self, texts: Iterable[str]) -> None:
        self.packets = [f"{MESSAGE}{text}" for text in texts]

    @cached_property
    def websocket(self) -> bytes:
        """As WebSocket frames, joined: one write however many changes there are."""
        return b"".join([text_frame(packet.encode()) for packet in self.packets])

    def __add__(self, other: "Frames") -> "Frames":
        both = Frames(())
        both.packets = self.packets + other.packets
        return both


def welcome(sid: str, pid: str, recovered: bool, offset: str) -> Frames:
    """The answer to CONNECT, and `feed:hello`."""
    return Frames([connect_packet(sid, pid), hello_packet(recovered, offset)])


def connected(sid: str, pid: str) -> Frames:
    """The answer to CONNECT alone."""
    return Frames([connect_packet(sid, pid)])


def hello(recovered: bool, offset: str) -> Frames:
    """`feed:hello` alone."""
    return Frames([hello_packet(recovered, offset)])


def connect_packet(sid: str, pid: str) -> str:
    """CONNECT. A client that gets its own `pid` back considers itself recovered."""
    return f"{CONNECT}{_json({'sid': sid, 'pid': pid})}"


def hello_packet(recovered: bool, offset: str) -> str:
    """`feed:hello`: from here on the client has an offset."""
    return f"{EVENT}{_json(['feed:hello', {'recovered': recovered}, offset])}"


def state(outage: Outage | None) -> Frames:
    """`feed:state`: whether changes arrive. It carries no offset: the client's stays as it is."""
    if outage is None:
        content: dict[str, Any] = {"live": True}
    else:
        content = {"live": False, "since": outage.since_text, "reason": outage.reason}
    return Frames([f"{EVENT}{_json(['feed:state', content])}"])


def refuse(namespace: str, reason: str) -> Frames:
    """CONNECT_ERROR for an unknown namespace."""
    return Frames([f"{CONNECT_ERROR}{namespace},{_json({'message': reason})}"])


def timed_changes(page: Page, epoch: Epoch) -> Frames:
    """The events of a page after `feed:timing`, which says when they were written and read (ms)."""
    timing = f"{EVENT}{_json(['feed:timing', {'at': page.written, 'now': page.read}])}"
    return Frames([timing]) + changes(page, epoch)


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
    """A truncate; or `feed:hello` for one topic: the client must load its rows again."""
    if change.op == "reload":
        hello = ["feed:hello", {"recovered": False, "topic": change.topic}, offset]
        return f"{EVENT}{_json(hello)}"
    return f'{EVENT}["{change.topic}:{change.op}","{offset}"]'
