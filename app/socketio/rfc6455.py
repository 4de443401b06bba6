"""The WebSocket protocol (RFC 6455) as values: handshake, frames, close codes. No I/O."""

import re
from base64 import b64encode
from enum import IntEnum
from hashlib import sha1
from typing import NamedTuple

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
KEY = re.compile(r"[A-Za-z0-9+/]{21}[AQgw]==")  # 16 bytes in base64 (section 4.1)
CONTROL_BYTES = 125  # the longest payload of a control frame (section 5.5)

FIN, RESERVED, OPCODE = 0x80, 0x70, 0x0F
MASKED, LENGTH = 0x80, 0x7F
LENGTH_16, LENGTH_64 = 126, 127


class Opcode(IntEnum):
    """What a frame is (section 5.2)."""

    CONTINUATION = 0
    TEXT = 1
    BINARY = 2
    CLOSE = 8
    PING = 9
    PONG = 10


class CloseCode(IntEnum):
    """Why a connection is closed (section 7.4.1)."""

    NORMAL = 1000
    PROTOCOL_ERROR = 1002
    NO_CODE = 1005
    NOT_UTF8 = 1007
    TOO_BIG = 1009


KNOWN_CODES = frozenset(
    {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, *range(3000, 5000)}
)
KNOWN_OPCODES = frozenset(Opcode)


class Violation(Exception):
    """The peer broke the protocol; the connection must be closed with `code`."""

    def __init__(self, code: CloseCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class ClientFrame(NamedTuple):
    """A frame from a client, unmasked; `end` is where the next one begins."""

    fin: bool
    opcode: int
    payload: bytes
    end: int


def accept(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a client's Sec-WebSocket-Key (section 4.2.2)."""
    return b64encode(sha1(key.encode() + GUID, usedforsecurity=False).digest()).decode()


def parse_frame(data: bytes | bytearray, start: int, limit_bytes: int) -> ClientFrame | None:
    """Return the client's frame that begins at `start`; None if it is incomplete.

    Raises Violation for what a client may not send, and for a payload above `limit_bytes`.
    """
    if len(data) < start + 2:
        return None
    head, length = data[start], data[start + 1]
    opcode = head & OPCODE
    if head & RESERVED or opcode not in KNOWN_OPCODES:
        raise Violation(CloseCode.PROTOCOL_ERROR, "reserved bits or opcode")
    if not length & MASKED:
        raise Violation(CloseCode.PROTOCOL_ERROR, "a frame without a mask")
    length &= LENGTH
    if opcode >= Opcode.CLOSE and (length > CONTROL_BYTES or not head & FIN):
        raise Violation(CloseCode.PROTOCOL_ERROR, "a long or fragmented control frame")
    begin = start + 2
    if length >= LENGTH_16:
        size = 2 if length == LENGTH_16 else 8
        if len(data) < begin + size:
            return None
        length = int.from_bytes(data[begin : begin + size])
        begin += size
    if length > limit_bytes:
        raise Violation(CloseCode.TOO_BIG, f"a frame of more than {limit_bytes} bytes")
    end = begin + 4 + length
    if len(data) < end:
        return None
    payload = unmask(data[begin + 4 : end], data[begin : begin + 4])
    return ClientFrame(bool(head & FIN), opcode, payload, end)


def unmask(payload: bytes | bytearray, mask: bytes | bytearray) -> bytes:
    """Return the payload without its mask, by XOR of two large integers (section 5.3)."""
    length = len(payload)
    if not length:
        return b""
    repeated = bytes(mask) * (length // 4 + 1)
    number = int.from_bytes(payload) ^ int.from_bytes(repeated[:length])
    return number.to_bytes(length)


def text_frame(payload: bytes) -> bytes:
    """Return an unfragmented text frame."""
    return frame(Opcode.TEXT, payload)


def text_head(length: int) -> bytes:
    """Return the head of an unfragmented text frame with a payload of this length."""
    return frame_head(Opcode.TEXT, length)


def close_frame(code: int) -> bytes:
    """Return a close frame with a code; an empty one for NO_CODE."""
    return frame(Opcode.CLOSE, b"" if code == CloseCode.NO_CODE else code.to_bytes(2))


def frame(opcode: int, payload: bytes) -> bytes:
    """Return an unmasked, unfragmented frame."""
    return frame_head(opcode, len(payload)) + payload


def frame_head(opcode: int, length: int) -> bytes:
    """Return the head of an unmasked, unfragmented frame with a payload of this length."""
    first = (FIN | opcode).to_bytes(1)
    if length < LENGTH_16:
        return first + length.to_bytes(1)
    if length < 1 << 16:
        return first + LENGTH_16.to_bytes(1) + length.to_bytes(2)
    return first + LENGTH_64.to_bytes(1) + length.to_bytes(8)


def read_close(payload: bytes) -> int:
    """Return the code in a client's close frame. Raises Violation for one it may not send."""
    if not payload:
        return CloseCode.NO_CODE
    code = int.from_bytes(payload[:2])
    if len(payload) < 2 or code not in KNOWN_CODES:
        raise Violation(CloseCode.PROTOCOL_ERROR, "an unknown close code")
    try:
        payload[2:].decode()
    except UnicodeDecodeError:
        raise Violation(CloseCode.NOT_UTF8, "a close reason that is not UTF-8") from None
    return code
