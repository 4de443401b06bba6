"""Requests on the Socket.IO paths, as values: what a plain upgrade is."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.http11 import Request
from websockets.server import ServerProtocol

from app.socketio.handshake import parse_upgrade

PATHS = ("/socket.io/", "/ws/")
PLAIN = [
    b"Host: example.org", b"Connection: keep-alive, Upgrade", b"Upgrade: websocket",
    b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
]  # fmt: skip
TARGET = b"/socket.io/?EIO=4&transport=websocket"
ODD_LINES = st.sampled_from(
    [
        b"Content-Length: 3", b"Transfer-Encoding: chunked", b"Expect: 100-continue", b" folded",
        b"Host: other", b"no colon", b"Space : x", b": x", b"X: \x00", b"X: \r", b"X:", b"X: \xff",
        b"Upgrade: h2c", b"Sec-WebSocket-Version: 8", b"Connection: close",
        b"Sec-WebSocket-Extensions: permessage-deflate", b"Cookie: a=b; c=d", b"Origin: null",
    ]
) | st.binary(max_size=12)  # fmt: skip
LINES = st.lists(st.sampled_from(PLAIN) | ODD_LINES, max_size=9) | st.permutations(PLAIN)
REQUEST_LINES = st.sampled_from(
    [
        b"GET " + TARGET + b" HTTP/1.1", b"GET /ws/ HTTP/1.1", b"get /ws/ HTTP/1.1",
        b"GET /ws HTTP/1.1", b"GET  /ws/ HTTP/1.1", b"GET /ws/?a=%zz&a=1 HTTP/1.1",
        b"GET /ws/ HTTP/1.0", b"POST /ws/ HTTP/1.1", b"GET /ws/../ws/ HTTP/1.1",
        b"GET http://x/ws/ HTTP/1.1", b"GET /ws/?q=\xff HTTP/1.1", b"GET /ws/#f HTTP/1.1",
    ]
) | st.binary(max_size=20)  # fmt: skip


def head_of(line: bytes, headers: list[bytes]) -> bytes:
    """A request without a body."""
    return b"\r\n".join([line, *headers, b"", b""])


def test_a_plain_upgrade() -> None:
    """A browser's request is taken with its query and headers."""
    head = head_of(b"GET " + TARGET + b"&sid=a%2Fb HTTP/1.1", [*PLAIN, b"Cookie:  a=b \t"])
    request = parse_upgrade(head, PATHS)
    assert request is not None
    assert request.query == {"EIO": "4", "transport": "websocket", "sid": "a/b"}
    assert request.headers["cookie"] == "a=b" and request.headers["host"] == "example.org"


@pytest.mark.parametrize("cut", range(1, 60))
def test_parts_of_a_request_are_not_taken(cut: int) -> None:
    """A request that has not arrived whole, or that something follows, is left alone."""
    head = head_of(b"GET " + TARGET + b" HTTP/1.1", PLAIN)
    assert parse_upgrade(head[:-cut], PATHS) is None
    assert parse_upgrade(head + b"\x81\x80mask"[: cut % 6 + 1], PATHS) is None


@settings(max_examples=500)
@given(REQUEST_LINES, LINES)
def test_what_is_taken_is_what_a_websocket_library_takes(line: bytes, headers: list[bytes]) -> None:
    """Whatever bytes come as a request: one that is taken for an upgrade is one to a library that
    shares no code with ours, with the same path, query and headers.
    """
    head = head_of(line, headers)
    request = parse_upgrade(head, PATHS)
    if request is None:
        return
    theirs = ServerProtocol()
    theirs.receive_data(head)
    [event] = theirs.events_received()
    assert isinstance(event, Request)
    assert theirs.accept(event).status_code == 101
    assert event.path.partition("?")[0] in PATHS
    assert {name.lower(): value for name, value in event.headers.raw_items()}.keys() == (
        request.headers.keys()
    )
    assert event.headers["Sec-WebSocket-Key"] == request.headers["sec-websocket-key"]


@pytest.mark.parametrize("inside", [b" ", b"\t", b"x ", b"a:"])
def test_long_headers_take_linear_time(inside: bytes) -> None:
    """A header of the greatest length costs as little as any of that length, whatever is in it."""
    head = head_of(b"GET " + TARGET + b" HTTP/1.1", [*PLAIN, b"X: a" + inside * 5000 + b"b"])
    began = time.process_time()
    assert parse_upgrade(head, PATHS) is not None
    assert time.process_time() - began < 0.05
