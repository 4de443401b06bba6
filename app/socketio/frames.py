"""Outgoing messages, encoded once: Socket.IO packets as text for polling, bytes for WebSockets."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import msgspec

from app.feed.health import Outage
from app.feed.log import Change, Page
from app.feed.offset import Epoch
from app.live.events import Event, PageEvents
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.socketio.codec import CONNECT, CONNECT_ERROR, EVENT, MESSAGE
from app.socketio.rfc6455 import text_frame, text_head

# What Socket.IO's own server says about a namespace that it does not have.
INVALID_NAMESPACE = "Invalid namespace"
END_OF_ROWS = b"]]"


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


class RowsMessage:
    """One packet of rows, for one client: made from bytes that all clients share, and not kept."""

    __slots__ = ("_prefix", "_rows")

    def __init__(self, prefix: str, rows: bytes) -> None:
        self._prefix = f"{MESSAGE}{prefix}[".encode()
        self._rows = rows

    @property
    def packets(self) -> list[str]:
        """As Engine.IO messages."""
        return [b"".join((self._prefix, self._rows, END_OF_ROWS)).decode()]

    @property
    def websocket(self) -> bytes:
        """As a WebSocket frame, copied once."""
        length = len(self._prefix) + len(self._rows) + len(END_OF_ROWS)
        return b"".join((text_head(length), self._prefix, self._rows, END_OF_ROWS))


Outgoing: TypeAlias = Frames | RowsMessage
"""What sessions write."""


def connected(namespace: str, sid: str, pid: str) -> Frames:
    """Return the answer to CONNECT. A client that gets its own `pid` back counts as recovered."""
    return Frames([f"{CONNECT}{within(namespace)}{_json({'sid': sid, 'pid': pid})}"])


def hello(namespace: str, recovered: bool, offset: str, key: Sequence[str] | None = None) -> Frames:
    """Return `feed:hello`, which gives the client an offset, and names the key columns if given."""
    content: dict[str, Any] = {"recovered": recovered}
    if key is not None:
        content["key"] = key
    return Frames([f"{EVENT}{within(namespace)}{_json(['feed:hello', content, offset])}"])


def within(namespace: str) -> str:
    """Return what comes between a packet's type and its content: the namespace, if not `/`."""
    return "" if namespace == "/" else f"{namespace},"


def state(outage: Outage | None, namespace: str = "/") -> Frames:
    """Return `feed:state`: whether changes arrive. It has no offset: the client keeps its own."""
    if outage is None:
        content: dict[str, Any] = {"live": True}
    else:
        content = {"live": False, "since": outage.since_text, "reason": outage.reason}
    return Frames([f"{EVENT}{within(namespace)}{_json(['feed:state', content])}"])


def refuse(namespace: str, refused: SubscriptionRefused) -> Frames:
    """Return CONNECT_ERROR: the client gets nothing, or nothing more, in a namespace."""
    data = {"code": refused.code, "detail": refused.detail}
    if refused.field is not None:
        data["field"] = refused.field
    is_unknown = refused.code is RefusalCode.UNKNOWN_TOPIC
    content = {"message": INVALID_NAMESPACE if is_unknown else refused.detail, "data": data}
    return Frames([f"{CONNECT_ERROR}{within(namespace)}{_json(content)}"])


@dataclass(frozen=True, slots=True)
class NamespaceEncoder:
    """Encodes the messages of a subscription in its namespace. `timing`: whether `feed:timing`
    comes before the events of a page.
    """

    namespace: str
    timing: bool

    def events(self, events: Sequence[Event], page: PageEvents) -> Frames:
        prefix = f'{EVENT}{self.namespace},["'
        first = [self._timing(page.page)] if self.timing else []
        return Frames([*first, *(event_packet(prefix, event, page) for event in events)])

    def _timing(self, page: Page) -> str:
        return f"{EVENT}{self.namespace},{timing_content(page)}"

    def rows(self, rows: bytes) -> RowsMessage:
        return RowsMessage(f'{EVENT}{self.namespace},["feed:rows",', rows)

    def loaded(self, offset: str) -> Frames:
        return Frames([f'{EVENT}{self.namespace},["feed:loaded","{offset}"]'])

    def quiet(self, offset: str) -> Frames:
        return Frames([f'{EVENT}{self.namespace},["feed:offset","{offset}"]'])

    def state(self, outage: Outage | None) -> Frames:
        return state(outage, self.namespace)


def event_packet(prefix: str, event: Event, page: PageEvents) -> str:
    """Return one event of a subscription. As in `changes`, nothing in it needs escaping."""
    topic = page.page.changes[event.place].topic
    arguments = "".join(f"{each}," for each in (event.body, event.old) if each is not None)
    return f'{prefix}{topic}:{event.operation}",{arguments}"{page.offset_at(event.place)}"]'


def timed_changes(page: Page, epoch: Epoch) -> Frames:
    """Return the events of a page after `feed:timing`: when the last was written, and all read."""
    return Frames([f"{EVENT}{timing_content(page)}"]) + changes(page, epoch)


def timing_content(page: Page) -> str:
    """Return the content of `feed:timing`: times in milliseconds since 1970."""
    return _json(["feed:timing", {"at": page.written, "now": page.read}])


def changes(page: Page, epoch: Epoch) -> Frames:
    """Return the events of a page. Rows are passed on as Postgres wrote them, never parsed; topics
    and offsets contain nothing that JSON would escape.
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
    """Return a truncate, or for a reload `feed:hello` for one topic: the client must load again."""
    if change.op == "reload":
        hello = ["feed:hello", {"recovered": False, "topic": change.topic}, offset]
        return f"{EVENT}{_json(hello)}"
    return f'{EVENT}["{change.topic}:{change.op}","{offset}"]'
