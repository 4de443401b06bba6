"""WebSocket frames as values, judged by the library `websockets`: it shares no code with ours."""

from base64 import b64encode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, Protocol, Side
from websockets.utils import accept_key

from app.socketio import rfc6455
from app.socketio.rfc6455 import CloseCode, Violation, parse_frame, read_close

LIMIT_BYTES = 1000
CONTROL = {Opcode.CLOSE, Opcode.PING, Opcode.PONG}
LENGTHS = st.sampled_from([0, 1, 2, 3, 4, 5, 125, 126, 127, 999, 1000])


@given(st.sampled_from(list(Opcode)), LENGTHS, st.booleans(), st.data())
def test_frames_of_clients_are_read(
    opcode: Opcode, length: int, fin: bool, data: st.DataObject
) -> None:
    """Any frame that a client library sends is read as it was meant, wherever it begins, and not
    before its last byte is there.
    """
    if opcode in CONTROL:
        length, fin = min(length, 125), True
    payload = data.draw(st.binary(min_size=length, max_size=length))
    before = data.draw(st.binary(max_size=5))
    sent = Frame(opcode, payload, fin).serialize(mask=True)
    for end in range(len(sent)) if length < 200 else (0, 1, 3, 9, len(sent) - 1):
        assert parse_frame(before + sent[:end], len(before), LIMIT_BYTES) is None
    found = parse_frame(before + sent + b"more", len(before), LIMIT_BYTES)
    assert found == (fin, opcode, payload, len(before) + len(sent))


@given(st.binary(max_size=40))
def test_any_bytes_are_judged_alike(data: bytes) -> None:
    """Whatever the library's parser takes for a frame is one with the same meaning; what it refuses
    or waits for is not. (Ours may refuse a frame by its first bytes, before it is there.)
    """
    theirs = Protocol(Side.SERVER, state=OPEN, max_size=LIMIT_BYTES)
    theirs.receive_data(data)
    received = [event for event in theirs.events_received() if isinstance(event, Frame)]
    try:
        found = parse_frame(data, 0, LIMIT_BYTES)
    except Violation as violation:
        assert not received
        assert violation.code in (CloseCode.PROTOCOL_ERROR, CloseCode.TOO_BIG)
        return
    if received:
        assert found is not None
        assert (found.opcode, found.payload) == (received[0].opcode, bytes(received[0].data))
    elif theirs.parser_exc is None:
        assert found is None


@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_frames_of_every_length(length: int) -> None:
    """The three forms of a frame's length change over where the standard says."""
    payload = b"x" * length
    assert rfc6455.text_frame(payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)


@pytest.mark.parametrize("sent", [LIMIT_BYTES + 1, 2**16, 2**40, 2**63])
def test_long_frames_are_refused_by_their_length(sent: int) -> None:
    """A frame that announces more than the limit is refused before it has come."""
    head = b"\x82\xff" + sent.to_bytes(8)
    with pytest.raises(Violation) as refused:
        parse_frame(head, 0, LIMIT_BYTES)
    assert refused.value.code == CloseCode.TOO_BIG


@pytest.mark.parametrize("code", [*range(900, 1020), 1100, 2999, 3000, 4999, 5000, 65535])
def test_close_codes(code: int) -> None:
    """A client may close with the codes that the library accepts, and no others."""
    payload = code.to_bytes(2) + b"bye"
    theirs = Protocol(Side.SERVER, state=OPEN)
    theirs.receive_data(Frame(Opcode.CLOSE, payload).serialize(mask=True))
    if theirs.parser_exc is None:
        assert read_close(payload) == code
        assert rfc6455.close_frame(code)[2:] == payload[:2]
    else:
        with pytest.raises(Violation):
            read_close(payload)


def test_odd_closes() -> None:
    """A close frame may be empty; one byte, or a reason that is not UTF-8, is refused."""
    assert read_close(b"") == CloseCode.NO_CODE and rfc6455.close_frame(1005) == b"\x88\x00"
    for payload in (b"\x03", b"\x03\xe8\xff"):
        with pytest.raises(Violation):
            read_close(payload)


@given(st.binary(min_size=16, max_size=16))
def test_the_handshake_is_answered(nonce: bytes) -> None:
    """The key of any client gets the answer that proves a WebSocket server."""
    key = b64encode(nonce).decode()
    assert rfc6455.KEY.fullmatch(key) and rfc6455.accept(key) == accept_key(key)
