"""What goes out is, byte for byte, what python-socketio and a WebSocket library would send."""

import json

import pytest
from engineio.packet import MESSAGE
from engineio.packet import Packet as EngineIOPacket
from socketio.packet import EVENT, Packet
from websockets.frames import Frame, Opcode

from app.feed.log import Change, Page
from app.feed.offset import Epoch, Offset, Position
from app.live.refusal import RefusalCode, SubscriptionRefused
from app.socketio import frames
from app.socketio.rfc6455 import text_frame

EPOCH = Epoch("e", "secret")
SINCE, UNTIL = Position(10, frozenset()), Position(14, frozenset({12}))
CHANGES = [
    Change(1, "thing", "create", '{"id":1,"name":"a","info":""}'),
    Change(2, "thing", "update", '{"id":1,"name":"b","info":""}'),
    Change(3, "thing", "destroy", '"b"'),
    Change(7, "thing", "truncate", None),
]


def page(until: Offset) -> Page:
    """The four kinds of change."""
    return Page(Offset(SINCE), until, CHANGES, written=5, read=9)


def as_sent_by_python_socketio(event: str, *arguments: object) -> str:
    """The packet as `AsyncServer.emit` would make it."""
    text = Packet(EVENT, data=[event, *arguments], namespace="/").encode()
    encoded = EngineIOPacket(MESSAGE, text).encode()
    assert isinstance(encoded, str)
    return encoded


def expected(until: Offset) -> list[str]:
    """The events of the page, with their offsets."""
    offsets = [EPOCH.format(Offset(SINCE, UNTIL, change.id)) for change in CHANGES]
    offsets[-1] = EPOCH.format(until)
    return [
        as_sent_by_python_socketio(
            f"thing:{change.op}", *([json.loads(change.body)] if change.body else []), offset
        )
        for change, offset in zip(CHANGES, offsets, strict=True)
    ]


@pytest.mark.parametrize("until", [Offset(UNTIL), Offset(SINCE, UNTIL, 7)])
def test_changes_by_polling(until: Offset) -> None:
    """A polling client takes the packets that python-socketio would have queued."""
    assert frames.changes(page(until), EPOCH).packets == expected(until)


def test_changes_by_websocket() -> None:
    """A WebSocket client takes the frames that a WebSocket library would have sent, joined."""
    sent = frames.changes(page(Offset(UNTIL)), EPOCH).websocket
    by_library = [Frame(Opcode.TEXT, text.encode()) for text in expected(Offset(UNTIL))]
    assert sent == b"".join(frame.serialize(mask=False) for frame in by_library)


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_frames_of_every_length(length: int) -> None:
    """The three forms of a frame's length change over where the standard says."""
    payload = b"x" * length
    assert text_frame(payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)


def test_what_python_socketio_says_besides_events() -> None:
    """CONNECT, CONNECT_ERROR and hello decode as what they are."""
    both = frames.connected("/", "sid", "pid") + frames.hello("/", True, "offset")
    connect, event = (Packet(encoded_packet=packet[1:]) for packet in both.packets)
    assert (connect.packet_type, connect.data) == (0, {"sid": "sid", "pid": "pid"})
    assert event.data == ["feed:hello", {"recovered": True}, "offset"]
    [named] = frames.hello("/order", False, "loading", ("tenant", "number")).packets
    content = {"recovered": False, "key": ["tenant", "number"]}
    assert Packet(encoded_packet=named[1:]).data == ["feed:hello", content, "loading"]
    refusal = SubscriptionRefused(RefusalCode.BAD_FILTER, "No.", "where")
    refused = Packet(encoded_packet=frames.refuse("/other", refusal).packets[0][1:])
    data = {"code": "bad_filter", "detail": "No.", "field": "where"}
    assert (refused.namespace, refused.data) == ("/other", {"message": "No.", "data": data})
    timed = frames.timed_changes(page(Offset(UNTIL)), EPOCH).packets
    assert timed == [
        as_sent_by_python_socketio("feed:timing", {"at": 5, "now": 9}),
        *expected(Offset(UNTIL)),
    ]
